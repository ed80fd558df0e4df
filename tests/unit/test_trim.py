"""A trimmed model is the whole one with some tokens left out: the same tokens, the same logits, and a way back."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import load
from bloomlm.checkpoint.reader import load_model
from bloomlm.cli.main import main
from bloomlm.data.corpus import Piece, find_corpus
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.config import BloomConfig
from bloomlm.vocabulary.effects import measure_trimmed, measure_whole
from bloomlm.vocabulary.embedding import changed_model, mean_row
from bloomlm.vocabulary.selection import (
    count_tokens,
    rank_tokens,
    read_vocabulary,
    select_tokens,
    trim_json,
)
from bloomlm.vocabulary.trim import MAP_FILE, Trim, plan_trim, restored_rows
from tests.bloom_tokenizer import make_tokenizer, tokenizer_json
from tests.tiny_bloom import write_adapter, write_bloom
from tests.tiny_checkpoint import random_model

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2.valid.tokens"
ALPHABETS = (
    "abc the and in",
    "中世不人 。，",
    "かなのは",
    "हिन्दी में।",
    "عربي، لغة",
    "\x00\n\t\r é\u0301🙂👩‍👧</s>\u200d",
)


def tiny() -> Tokenizer:
    return load("builtin:tiny").tokenizer


def real_texts() -> list[str]:
    dates = [piece.text for piece in find_corpus(["builtin:dates"]).pieces()][:3000]
    wikitext = WIKITEXT.read_text()[:200_000] if WIKITEXT.is_file() else "The text of an article . "
    return [*dates, *(line for line in wikitext.splitlines(keepends=True))]


def random_text(rng: random.Random) -> str:
    """Words of several scripts, or any characters at all."""
    if rng.random() < 0.3:
        codes = [
            rng.choice([rng.randrange(0x300), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            for _ in range(30)
        ]
        return "".join(map(chr, codes))
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randrange(60)))


def trim_randomly(tokenizer: Tokenizer, rng: random.Random, config: BloomConfig | None = None) -> Trim:
    vocabulary = read_vocabulary(tokenizer)
    ranks = np.array([rng.random() for _ in range(vocabulary.num_ids)])
    num_tokens = rng.randrange(len(vocabulary.required), len(vocabulary.ids) + 1)
    kept = select_tokens(vocabulary, ranks, num_tokens=num_tokens)
    assert len(kept) == num_tokens
    whole = config or BloomConfig(vocab_size=vocabulary.num_ids, hidden_size=8, n_layer=1, n_head=1)
    return plan_trim(vocabulary, kept, whole, tokenizer, rng.choice([1, 64]))


@pytest.mark.parametrize("make", [tiny, make_tokenizer])
@pytest.mark.parametrize("seed", range(6))
def test_texts_of_kept_tokens_have_the_same_tokens(make: Callable[[], Tokenizer], seed: int) -> None:
    rng, tokenizer = random.Random(seed), make()
    trim = trim_randomly(tokenizer, rng)
    new_ids = {old: new for new, old in enumerate(trim.kept.tolist())}
    texts = [*rng.sample(real_texts(), 1500), *(random_text(rng) for _ in range(500))]
    # words one by one too, of which more have kept tokens only
    texts += [word for text in texts[:300] for word in text.split(" ")]
    num_same = 0
    for text, old, new in zip(texts, tokenizer.encode_batch(texts), trim.tokenizer.encode_batch(texts), strict=True):
        if all(token in new_ids for token in old):
            num_same += 1
            assert new == [new_ids[token] for token in old], text
        assert trim.tokenizer.decode(new, skip_special_tokens=False) == text
        assert trim.tokenizer.decode(new) == tokenizer.decode(old)
    assert num_same > 300


@pytest.mark.parametrize("seed", range(4))
def test_kept_tokens_are_closed_under_the_merges_that_build_them(seed: int) -> None:
    tokenizer = tiny()
    vocabulary = read_vocabulary(tokenizer)
    trim = trim_randomly(tokenizer, random.Random(seed))
    kept = set(trim.kept.tolist())
    assert vocabulary.required <= kept and len(vocabulary.required) == 260
    assert all(vocabulary.parts.get(token, frozenset()) <= kept for token in kept)
    content, whole = json.loads(trim.tokenizer.json), json.loads(tokenizer.json)
    expected = [pair for pair in whole["model"]["merges"] if vocabulary.ids["".join(pair)] in kept]
    assert content["model"]["merges"] == expected
    assert sorted(content["model"]["vocab"].values()) == list(range(len(kept)))


def test_a_token_that_two_merges_build_keeps_the_parts_of_both() -> None:
    content = tokenizer_json()
    model = content["model"]
    assert isinstance(model, dict)
    model["merges"] = ["a b", "b c", "a bc", "ab c"]
    tokens = [token for token in model["vocab"] if len(token) == 1 or token.startswith("<")]
    model["vocab"] = {token: place for place, token in enumerate([*tokens, "ab", "bc", "abc"])}
    tokenizer = make_tokenizer().with_json(json.dumps(content, ensure_ascii=False).encode())
    vocabulary = read_vocabulary(tokenizer)
    ranks = np.full(vocabulary.num_ids, 2.0)
    ranks[vocabulary.ids["abc"]] = 0.0
    kept = select_tokens(vocabulary, ranks)
    assert len(kept) == len(vocabulary.required) + 3
    trimmed = tokenizer.with_json(trim_json(vocabulary, kept))
    assert trimmed.encode("abc abcbc") == tokenizer.encode("abc abcbc")


def test_coverage_holds_in_every_language_and_with_few_tokens() -> None:
    tokenizer = tiny()
    vocabulary = read_vocabulary(tokenizer)
    pieces = list(find_corpus(["builtin:dates"]).pieces())
    pieces += [Piece("big", "The model has a field and the form of it. " * 20_000)]
    counts = count_tokens(pieces, tokenizer, vocabulary.num_ids)
    expected = np.zeros(vocabulary.num_ids, dtype=np.int64)
    for piece in pieces[:-1]:
        np.add.at(expected, np.array(tokenizer.encode(piece.text)), int(piece.language == "yo"))
    assert np.array_equal(counts["yo"], expected)
    ranks = rank_tokens(list(counts.values()))
    sizes = []
    for coverage in (0.5, 0.9, 0.99, 1.0):
        kept = select_tokens(vocabulary, ranks, coverage=coverage)
        shares = [found[kept].sum() / found.sum() for found in counts.values()]
        assert min(shares) >= coverage
        sizes.append(len(kept))
    assert sizes == sorted(set(sizes)) and sizes[-1] < 1000
    used = set(np.flatnonzero(sum(counts.values())).tolist())
    assert used <= set(select_tokens(vocabulary, ranks).tolist())
    for few in (259, 2049):
        with pytest.raises(ConfigError, match="260 always stay"):
            select_tokens(vocabulary, ranks, num_tokens=few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_logits_are_the_same_bits(dtype: torch.dtype) -> None:
    loaded = load("builtin:tiny", dtype=dtype)
    trim = trim_randomly(loaded.tokenizer, random.Random(1), loaded.model.config)
    small = changed_model(loaded.model, trim)
    kept = torch.from_numpy(trim.kept)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 7, 64):
        new = torch.randint(len(kept), (2, length), generator=generator)
        with torch.inference_mode():
            expected, found = loaded.model(kept[new]), small(new)
        assert torch.equal(found[..., : len(kept)], expected[..., kept])


def test_padding_rows_never_win() -> None:
    """Rows of zeros would: this model gives every token a negative logit."""
    config = BloomConfig(vocab_size=2048, hidden_size=32, n_layer=2, n_head=4)
    model, tokenizer = random_model(config), tiny()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.word_embeddings.weight.sub_(2.0)
    vocabulary = read_vocabulary(tokenizer)
    kept = select_tokens(vocabulary, np.arange(vocabulary.num_ids) / 1e4, num_tokens=301)
    trim = plan_trim(vocabulary, kept, config, tokenizer, 64)
    assert trim.num_padding_rows == 19 and trim.config.vocab_size == 320
    small = changed_model(model, trim)
    tokens = torch.randint(301, (4, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = small(tokens)
    assert float(logits.max()) < 0
    assert int(logits.argmax(-1).max()) < 301
    padding = logits.double().softmax(-1)[..., 301:]
    assert float(padding.max()) <= 1 / 301
    assert torch.equal(
        small.transformer.word_embeddings.weight[301:],
        mean_row(model.transformer.word_embeddings.weight, torch.from_numpy(kept)).expand(19, -1),
    )


def test_rows_are_read_in_any_blocks() -> None:
    trim = trim_randomly(tiny(), random.Random(3))
    embedding = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    rows = trim.rows(embedding)
    whole = rows.read_rows(0, rows.shape[0])
    assert whole.shape == rows.shape and torch.equal(whole[: len(trim.kept)], embedding[trim.kept])
    assert torch.equal(torch.cat(list(rows.split(37))), whole)
    changed = whole + 1
    back = restored_rows(changed, embedding, torch.from_numpy(trim.kept))
    expected = embedding.clone()
    expected[trim.kept] += 1
    assert torch.equal(torch.cat(list(back.split(53))), expected)


def test_greedy_texts_differ_only_where_a_removed_token_would_have_won() -> None:
    loaded = load("builtin:tiny", dtype="float32")
    vocabulary = read_vocabulary(loaded.tokenizer)
    pieces = list(find_corpus(["builtin:dates"]).pieces())[:400] + [Piece("en", "The model has a field. " * 9)] * 4
    ranks = rank_tokens(list(count_tokens(pieces[:200], loaded.tokenizer, 2048).values()))
    whole = measure_whole(loaded.model, loaded.tokenizer, pieces)
    results = []
    for num_tokens in (300, 700, 2048):
        kept = select_tokens(vocabulary, ranks, num_tokens=num_tokens)
        effects = measure_trimmed(whole, plan_trim(vocabulary, kept, loaded.model.config, loaded.tokenizer))
        assert effects.greedy.num_other == 0
        removed = sorted(set(range(2048)) - set(kept.tolist()))
        expected = 0
        for piece in pieces[::40]:
            ids = [1, *loaded.tokenizer.encode(piece.text)[:-1]]
            expected += int(torch.isin(loaded.model(torch.tensor([ids])).argmax(-1), torch.tensor(removed)).sum())
        assert (effects.num_removed_likeliest > 0) == (expected > 0)
        results.append(effects)
    assert results[1].greedy.num_removed_won > 0 and results[0].greedy.num_prompts_changed > 0
    assert results[2].greedy.num_same == results[2].greedy.num_prompts
    assert results[2].num_removed_likeliest == 0
    assert results[0].num_removed_likeliest > results[1].num_removed_likeliest
    assert results[2].fits == whole.fits


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["trim", *words])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trim") / "out"
    words = ("--model_name_or_path", "builtin:tiny", "--corpus", "builtin:dates", "--output_path", str(output))
    size = ("--keep_tokens", "700", "--pad_to_multiple_of", "64", "--sweep", "500,900", "--held_out_bytes", "300")
    assert run(*words, *size) == 0
    return output


def test_the_command_writes_a_model_and_a_report(trimmed: Path) -> None:
    loaded, whole = load(trimmed), load("builtin:tiny")
    assert loaded.model.config.vocab_size == 704 and loaded.tokenizer.vocab_size == 700
    assert loaded.model.transformer.dtype is torch.float16
    kept = json.loads((trimmed / MAP_FILE).read_text())["old_ids"]
    embedding = whole.model.transformer.word_embeddings.weight
    assert torch.equal(loaded.model.transformer.word_embeddings.weight[:700], embedding[kept])
    others = {name: p for name, p in whole.model.named_parameters() if "word_embeddings.weight" not in name}
    found = dict(loaded.model.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in others.items()) and len(others) > 40
    report = json.loads((trimmed / "report.json").read_text())
    assert report["before"]["tokens"] == 2048 and report["after"]["parameters"] == loaded.model.config.num_parameters
    assert len(report["held_out"]) == 20 and report["held_out"]["all"]["after"]["bits_per_byte"] > 0
    assert [row["tokens"] for row in report["sweep"]] == [500, 700, 900]
    assert report["sweep"][0]["tokens_per_word"] > report["sweep"][-1]["tokens_per_word"]
    assert "## Sizes" in (trimmed / "report.md").read_text()
    assert (trimmed / "report.png").read_bytes()


def test_special_tokens_have_their_ids(tmp_path: Path) -> None:
    content = tokenizer_json(special=("<a>", "<b>", "<unk>", "<s>", "</s>", "<pad>"))
    content["added_tokens"] = content["added_tokens"][2:]  # type: ignore[index]
    tokenizer = make_tokenizer().with_json(json.dumps(content, ensure_ascii=False).encode())
    config = BloomConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, n_layer=1, n_head=1, bos_token_id=3, eos_token_id=4,
        pad_token_id=5, unk_token_id=2, extra={"sep_token_id": 4, "decoder_start_token_id": 0, "seq_length": 9},
    )  # fmt: skip
    vocabulary = read_vocabulary(tokenizer)
    kept = select_tokens(vocabulary, np.full(vocabulary.num_ids, 2.0))
    trim = plan_trim(vocabulary, kept, config, tokenizer)
    assert 0 not in kept and 1 not in kept
    assert (trim.config.unk_token_id, trim.config.bos_token_id, trim.config.eos_token_id) == (0, 1, 2)
    assert trim.config.extra == {"sep_token_id": 2, "decoder_start_token_id": None, "seq_length": 9}
    assert (trim.tokenizer.bos_token_id, trim.tokenizer.pad_token_id) == (1, 3)
    assert 0 in select_tokens(read_vocabulary(tokenizer, named=(0, None)), np.full(vocabulary.num_ids, 2.0))


def test_added_tokens_decoder_follows(tmp_path: Path) -> None:
    content = tokenizer_json(special=("<a>", "<unk>", "<s>", "</s>", "<pad>"))
    content["added_tokens"] = content["added_tokens"][1:]  # type: ignore[index]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"3": {"content": "</s>", "special": True}}, "eos_token": "</s>"})
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    vocabulary = read_vocabulary(tokenizer)
    kept = select_tokens(vocabulary, np.full(vocabulary.num_ids, 2.0))
    tokenizer.with_json(trim_json(vocabulary, kept)).save(tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found["added_tokens_decoder"] == {"2": {"content": "</s>", "special": True}}
    assert Tokenizer.from_directory(tmp_path).eos_token_id == 2


def test_restore_gives_the_whole_model_again(trimmed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model_name_or_path", "builtin:tiny", "--restore", str(trimmed), "--output_path")
    assert run(*words, str(tmp_path / "again")) == 0
    found, whole = load(tmp_path / "again"), load("builtin:tiny")
    assert found.tokenizer.fingerprint == whole.tokenizer.fingerprint
    assert found.model.config == whole.model.config
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())
    assert run(*words, str(tmp_path / "again"), "--keep_tokens", "700") == 2
    assert "--keep_tokens is for trimming" in capsys.readouterr().err


def test_restore_takes_trained_rows_and_refuses_other_models(
    trimmed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bloomlm.checkpoint.writer import write_model

    loaded, trained = load(trimmed, dtype="float32"), tmp_path / "trained"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    trained.mkdir()
    write_model(trained, loaded.model.config, loaded.model.named_parameters())
    loaded.tokenizer.save(trained)  # as training does: there is no map
    words = ("--restore", str(trained), "--output_path", str(tmp_path / "again"))
    assert run("--model_name_or_path", "builtin:tiny", *words) == 0
    found = load_model(tmp_path / "again")
    kept = json.loads((trimmed / MAP_FILE).read_text())["old_ids"]
    expected = load_model("builtin:tiny", dtype=torch.float32).state_dict() | {
        name: value for name, value in loaded.model.state_dict().items() if "word_embeddings.weight" not in name
    }
    name = "transformer.word_embeddings.weight"
    rows = load_model("builtin:tiny", dtype=torch.float32).state_dict()[name].clone()
    rows[kept] = loaded.model.state_dict()[name][:700]
    assert all(torch.equal(value, {**expected, name: rows}[key]) for key, value in found.state_dict().items())
    other = write_bloom(tmp_path / "other")
    assert run("--model_name_or_path", str(other), *words) == 2
    assert "it is not trimmed from that model" in capsys.readouterr().err
    changed = json.loads((trimmed / MAP_FILE).read_text()) | {"source_fingerprint": "0"}
    (trained / MAP_FILE).write_text(json.dumps(changed))
    assert run("--model_name_or_path", "builtin:tiny", *words) == 2
    assert "it was trimmed from builtin:tiny" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [LoraConfig(r=4), PrefixConfig(num_prefix_tokens=3)], ids=["lora", "prefix"])
def test_adapters_of_the_whole_model_fit(trimmed: Path, tmp_path: Path, adapter: LoraConfig | PrefixConfig) -> None:
    path = write_adapter(tmp_path / "adapter", Path("builtin:tiny"), adapter)
    whole = load("builtin:tiny", adapter_path=path, dtype="float32")
    small = load(trimmed, adapter_path=path, dtype="float32")
    kept = torch.tensor(json.loads((trimmed / MAP_FILE).read_text())["old_ids"])
    new = torch.randint(700, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, plain = whole.model(kept[new]), load("builtin:tiny", dtype="float32").model(kept[new])
        found = small.model(new)
    assert torch.equal(found[..., :700], expected[..., kept])
    assert not torch.allclose(plain, expected, atol=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give texts of the languages to keep"),
        (("--corpus", "builtin:dates", "--keep_tokens", "500", "--coverage", "0.9"), "give one of them"),
        (("--corpus", "builtin:dates", "--keep_tokens", "200"), "260 always stay"),
        (("--corpus", "builtin:dates", "--sweep", "many"), "expected numbers of tokens"),
        (("--corpus", "builtin:dates", "--coverage", "1.5"), "at most 1"),
        (("--corpus", "nothing.txt"), "no such file"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run("--model_name_or_path", "builtin:tiny", "--output_path", str(output), *words) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("bloomlm.cli.trim.write_report", fail)
    words = ("--model_name_or_path", "builtin:tiny", "--corpus", "builtin:dates", "--held_out_bytes", "0")
    assert run(*words, "--output_path", str(tmp_path / "out")) == 2
    assert list(tmp_path.iterdir()) == []


def test_without_held_out_text_no_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bloomlm.cli.trim.load", None)
    words = ("--model_name_or_path", "builtin:tiny", "--corpus", "builtin:dates", "--held_out_bytes", "0")
    assert run(*words, "--output_path", str(tmp_path / "out"), "--coverage", "0.99") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["greedy"]["positions"] == 0 and min(report["dropped"]["coverage"].values()) >= 0.99
    assert list(report["held_out"]) == ["all"] and report["held_out"]["all"]["before"]["bytes"] == 0
    assert "No text was held out" in (tmp_path / "out" / "report.md").read_text()
    assert "No text was held out" in capsys.readouterr().out


def test_models_of_other_forms_and_in_shards(tmp_path: Path) -> None:
    """PaddleNLP's files with spare rows; named held-out texts by language; several weight files."""
    base, paddle = write_bloom(tmp_path / "base"), tmp_path / "paddle"
    with pytest.raises(SystemExit) as end:
        main(["convert", "--input", str(base), "--output", str(paddle), "--to", "paddle"])
    assert not end.value.code
    (tmp_path / "texts" / "en").mkdir(parents=True)
    (tmp_path / "texts" / "en" / "a.txt").write_text("the and thing, on\n" * 50)
    (tmp_path / "texts" / "zh.jsonl").write_text(json.dumps({"text": "中世不" * 30}) + "\n")
    texts = ("--languages_from", str(tmp_path / "texts"), "--held_out", str(tmp_path / "texts"))
    size = ("--max_shard_size", "30KB", "--held_out_bytes", "1100", "--coverage", "1", "--dtype", "float32")
    output = tmp_path / "out"
    assert run("--model_name_or_path", str(paddle), *texts, *size, "--output_path", str(output)) == 0
    assert len(list(output.glob("model-*.safetensors"))) > 1
    kept = json.loads((output / MAP_FILE).read_text())["old_ids"]
    report = json.loads((output / "report.json").read_text())
    assert set(report["dropped"]["coverage"]) == {"en", "zh"} and set(report["held_out"]) == {"en", "zh", "all"}
    assert 500 < report["held_out"]["en"]["before"]["bytes"] <= 1100
    expected = load_model(base).transformer.word_embeddings.weight[kept]
    found = load_model(output).transformer.word_embeddings.weight
    assert torch.equal(found, expected) and len(found) < load_model(base).config.vocab_size - 6
    assert report["dropped"]["occurrences"] == 0 and report["held_out"]["all"]["after"]["tokens_per_word"] > 0
