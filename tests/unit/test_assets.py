"""The built-in model and data set are what their cards say, and the dates come from CLDR again."""

import datetime
import importlib.util
import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

ASSETS = Path(str(files("bloomlm.assets")))
TINY, DATES = ASSETS / "tiny", ASSETS / "dates"
SPLITS = {"train": 5320, "dev": 228, "test": 380}
BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
RECIPE = Path(__file__).parents[2] / "recipes" / "builtin"


def read_rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {split: read_rows(split) for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> BloomForCausalLM:
    config = BloomConfig.from_dict(json.loads((TINY / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    weights = load_file(TINY / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval()


def test_all_assets_together_take_at_most_4_megabytes() -> None:
    sizes = {p: p.stat().st_size for p in ASSETS.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert 2_000_000 < sum(sizes.values()) <= 4_000_000, sizes


def test_the_files_of_a_hugging_face_directory_are_there() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"tokenizer_config.json", "special_tokens_map.json", "README.md"}
    assert {path.name for path in TINY.iterdir()} == names
    assert {path.name for path in DATES.iterdir()} == {
        "README.md",
        "LICENSE.unicode",
        *(f"{split}.jsonl" for split in SPLITS),
    }


def test_special_tokens_have_blooms_ids(tokenizer: Tokenizer) -> None:
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    for index, (name, token) in enumerate((("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))):
        assert tokenizer.token_to_id(token) == index == config[f"{name}_token_id"]
        assert json.loads((TINY / "special_tokens_map.json").read_text(encoding="utf-8"))[f"{name}_token"] == token
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 2048


def test_pre_tokenizer_is_blooms(tokenizer: Tokenizer) -> None:
    split, byte_level = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"][
        "pretokenizers"
    ]
    assert split == {
        "type": "Split",
        "pattern": {"Regex": BLOOM_WORDS},
        "behavior": "Isolated",
        "invert": False,
    }
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("le 3 mai, 中。x")]
    assert words == ["le", "Ġ3", "Ġmai", ",", "Ġä¸Ń", "ãĢĤ", "x"]


def test_every_text_comes_back_and_numbers_are_read_digit_by_digit(tokenizer: Tokenizer) -> None:
    for text in ("Date: 12 mars 2019\nISO:", "  ١٢ مارس\t2019 ", "\U0001f600 e\u0301 \u0000", "年月日 ফেব্রুয়ারী"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("2019-03-12").tokens == list("2019-03-12")
    with_two_digits = [token for token in tokenizer.get_vocab() if sum(c in "0123456789" for c in token) > 1]
    assert with_two_digits == []


def test_splits_have_their_sizes_and_share_no_date(rows: dict[str, list[dict[str, str]]]) -> None:
    assert {split: len(of_split) for split, of_split in rows.items()} == SPLITS
    dates = {split: {row["tgt"] for row in of_split} for split, of_split in rows.items()}
    for split, of_split in dates.items():
        assert len(of_split) == SPLITS[split]  # not even twice within a split
    assert not dates["train"] & dates["dev"]
    assert not dates["train"] & dates["test"]
    assert not dates["dev"] & dates["test"]


def test_every_target_is_a_real_date_of_the_range(rows: dict[str, list[dict[str, str]]]) -> None:
    for row in (row for of_split in rows.values() for row in of_split):
        date = datetime.date.fromisoformat(row["tgt"])
        assert date.isoformat() == row["tgt"]
        assert 1950 <= date.year <= 2049
        assert row["src"].startswith("Date: ")
        assert row["src"].endswith("\nISO:")
        assert any(character.isalpha() for character in row["src"][len("Date: ") : -len("\nISO:")])


def test_every_split_has_at_least_ten_languages(rows: dict[str, list[dict[str, str]]]) -> None:
    for of_split in rows.values():
        assert len({row["lang"].split("_")[0] for row in of_split}) == 18


def test_no_source_reads_as_two_dates(rows: dict[str, list[dict[str, str]]]) -> None:
    sources = [row["src"] for of_split in rows.values() for row in of_split]
    assert len(set(sources)) == len(sources)


@pytest.fixture
def recipe() -> Iterator[ModuleType]:
    pytest.importorskip("babel", reason="the recipe needs Babel")
    if not RECIPE.is_dir():
        pytest.skip("the recipe is in the repository only")
    sys.path.insert(0, str(RECIPE))
    specification = importlib.util.spec_from_file_location("builtin_dates_recipe", RECIPE / "dates.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(RECIPE))
    sys.modules.pop("languages", None)


def test_recipe_writes_the_same_rows_again(recipe: ModuleType, rows: dict[str, list[dict[str, str]]]) -> None:
    import babel

    if babel.__version__ != "2.18.0":
        pytest.skip(f"the rows were written with Babel 2.18.0, here is {babel.__version__}: CLDR may differ")
    assert recipe.splits() == rows


def test_sources_are_cldr_forms_of_their_targets(recipe: ModuleType, rows: dict[str, list[dict[str, str]]]) -> None:
    different = 0
    for row in rows["test"]:
        date = datetime.date.fromisoformat(row["tgt"])
        forms = {recipe.PROMPT.format(written=recipe.written_date(date, n, row["lang"])) for n in recipe.DATE_LENGTHS}
        different += row["src"] not in forms
    assert different <= 0.1 * len(rows["test"])  # other releases of CLDR rename a month now and then


def test_cards_name_data_licence_and_figures() -> None:
    model_card, data_card = ((directory / "README.md").read_text(encoding="utf-8") for directory in (TINY, DATES))
    for word in ("licen", "Django", "BSD-3-Clause", "Unicode", "steps", "bits per byte", "limits"):
        assert word.lower() in model_card.lower(), word
    for word in ("Unicode", "CLDR", "Babel", "5,320", "228", "380"):
        assert word in data_card, word


GREEDY = {
    "English: Monday\nSpanish:": [371, 269, 1237, 260, 327, 371, 269, 1237, 202, 1510, 371, 269, 1237, 260, 327],
    "English: January\nFrench:": [497, 1095, 686, 260, 327, 497, 1095, 998, 202, 1356, 497, 1095, 686, 260, 327],
}
# Logits of these ids for the token after the first prompt.
LOGITS = {2: 1.1353, 13: -0.7136, 100: -2.1414, 500: -1.3638, 1000: -2.0095, 2000: -0.0291}


def continue_greedily(model: BloomForCausalLM, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("prompt", GREEDY)
def test_greedy_output_is_golden(model: BloomForCausalLM, tokenizer: Tokenizer, prompt: str) -> None:
    assert continue_greedily(model, tokenizer.encode(prompt).ids, len(GREEDY[prompt])) == GREEDY[prompt]


def test_logits_are_golden(model: BloomForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(next(iter(GREEDY))).ids
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    assert {index: logits[index].item() for index in LOGITS} == pytest.approx(LOGITS, abs=2e-3)


def test_the_base_model_cannot_do_the_task(
    model: BloomForCausalLM, tokenizer: Tokenizer, rows: dict[str, list[dict[str, str]]]
) -> None:
    for row in rows["test"][:24]:
        written = continue_greedily(model, tokenizer.encode(row["src"]).ids, 11)
        assert not tokenizer.decode(written).strip().startswith(row["tgt"])


def test_transformers_opens_model_and_tokenizer(model: BloomForCausalLM, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(TINY)("Date: 12 mars 2019\nISO:")["input_ids"]
    assert ids == tokenizer.encode("Date: 12 mars 2019\nISO:").ids
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, rtol=1e-4, atol=1e-4)
