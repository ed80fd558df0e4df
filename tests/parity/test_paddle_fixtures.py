"""Files that PaddleNLP wrote, against the logits that PaddleNLP computed from them."""

import hashlib
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bloomlm.checkpoint.paddle.importer import PrefixLayout, find_model, open_model
from bloomlm.checkpoint.paddle.unpickler import load_paddle_pickle
from bloomlm.checkpoint.reader import read_config, read_into_model
from bloomlm.data.gpt2_files import build_tokenizer_json
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.tokenizer_files import DEFAULT_SPECIAL_TOKENS
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from tests.paddle_files import install_paddle_adapter, read_paddle_adapter, resume_paddle_adapter
from tests.paddle_fixtures import ARCHIVE, CHECKSUMS, FIXTURES, SHARED, present

TOLERANCE = 5e-5
BASE = "models/bloom_h64_l3_a4"
TP = "tp/bloom_h64_l3_a4_tp2_A"
LORA = "lora/bloom_h64_l3_a4"
PREFIX = "prefix/bloom_h64_l3_a4"
REF = "ref/bloom_h64_l3_a4"
PAD = 3


def test_the_archive_is_what_the_list_says() -> None:
    """Where the files that it was made from are present, they have the same bytes."""
    with tarfile.open(ARCHIVE) as archive:
        found = {member.name: hashlib.sha256(archive.extractfile(member).read()).hexdigest() for member in archive}  # type: ignore[union-attr]
    listed = {name: digest for digest, name in (line.split("  ") for line in CHECKSUMS.read_text().splitlines())}
    assert found == listed
    if SHARED.is_dir():
        assert {name: hashlib.sha256((SHARED / name).read_bytes()).hexdigest() for name in listed} == listed


def load_base(directory: str) -> BloomForCausalLM:
    path = FIXTURES / directory
    config = read_config(path)
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    assert find_model(path)
    return read_into_model(model, open_model(path, config))


def read_array(name: str) -> Any:
    return np.load(FIXTURES / name)


def difference(model: BloomForCausalLM, ids_name: str, reference_name: str) -> float:
    """The largest difference at real tokens; pads are masked where the reference masked them."""
    ids = torch.from_numpy(read_array(ids_name))
    mask = (ids != PAD).long() if "_mask" in reference_name else torch.ones_like(ids)
    with torch.no_grad():
        logits = model.eval()(ids, mask).numpy()
    return float(np.abs(logits - read_array(reference_name))[mask.bool().numpy()].max())


MODELS = [
    (BASE, f"{REF}/A_logits_{{}}.npy"),
    (BASE, f"{REF}/B_logits_{{}}.npy"),
    *((name, "ref/bloom_h64_l3_a4_div/A_logits_{}.npy") for name in present(f"{BASE}_div")),
    (f"{BASE}_p261", f"{REF}/p261_logits_{{}}.npy"),
    (f"{BASE}_p261_sharded", f"{REF}/p261_logits_{{}}.npy"),
    (f"{TP}/shards", f"{TP}/ref_logits_{{}}.npy"),
    (f"{TP}/merged", f"{TP}/ref_logits_{{}}.npy"),
    ("autodist/bloom_h64_l3_a4_tp2_structured", f"{TP}/ref_logits_{{}}.npy"),
    ("autodist/bloom_h64_l3_a4_tp2_static_names", f"{TP}/ref_logits_{{}}.npy"),
]


@pytest.mark.parametrize(("directory", "reference"), MODELS)
def test_models(directory: str, reference: str) -> None:
    model = load_base(directory)
    ids = "ref/bloom_h64_l3_a4_div" if "div" in directory else REF
    checked = 0
    for ids_name, kind in (
        ("ids", "nomask"),
        ("ids_left", "left_mask"),
        ("ids_left", "left_nomask"),
        ("ids_right", "right_mask"),
    ):
        if (FIXTURES / reference.format(kind)).is_file():
            assert difference(model, f"{ids}/{ids_name}.npy", reference.format(kind)) < TOLERANCE
            checked += 1
    assert checked


ADAPTERS = [
    *(
        (BASE, f"{LORA}/{name}", f"{LORA}/{name}/ref_logits_{{}}.npy", {})
        for name in (
            "A_qkv_TFT",
            "M_qkv_TFT_headdim",
            "B_qkv",
            "B_qkv_mergeTrue",
            "p261_qkv",
            "p261_all",
            "p261_all_bias",
        )
    ),
    *(
        (BASE, f"{PREFIX}/{name}", f"{PREFIX}/{name}/ref_logits_{{}}.npy", {})
        for name in ("A_noproj", "A_proj", "B_noproj", "B_proj")
    ),
    *(
        (BASE, f"{PREFIX}/{name}", f"{PREFIX}/{name}/ref_logits_{{}}.npy", {"prefix_layout": PrefixLayout.NEW})
        for name in ("p261_noproj", "p261_proj")
    ),
    *(
        (f"{TP}/shards", f"{TP}/{name}_{form}", f"{TP}/{name}_ref_logits_{{}}.npy", options)
        for name in ("lora", "prefix_noproj", "prefix_proj")
        for form, options in (("shards", {}), ("merged", {"trained_tensor_parallel_degree": 2}))
        if present(f"{TP}/{name}_{form}")
    ),
]


@pytest.mark.parametrize(("base", "directory", "reference", "options"), ADAPTERS, ids=[a[1] for a in ADAPTERS])
def test_adapters(base: str, directory: str, reference: str, options: dict[str, Any]) -> None:
    for install in (install_paddle_adapter, resume_paddle_adapter):
        model = load_base(base)
        install(model, read_paddle_adapter(FIXTURES / directory, model.config, **options))
        assert difference(model, f"{REF}/ids.npy", reference.format("nomask")) < TOLERANCE
        for ids_name, kind in (
            ("ids_left", "left_mask"),
            ("ids", "nomask_evalmode"),  # with the update added into the weights
            ("ids", "nomask_reloaded"),
        ):
            if (FIXTURES / reference.format(kind)).is_file():
                assert difference(model, f"{REF}/{ids_name}.npy", reference.format(kind)) < TOLERANCE


GREEDY = [
    *((BASE, None, f"{REF}/{tag}_gen_{{}}_greedy_ids.npy") for tag in ("A", "B", "p261")),
    *((name, None, "ref/bloom_h64_l3_a4_div/A_gen_{}_greedy_ids.npy") for name in present(f"{BASE}_div")),
    *((base, directory, f"{directory}/ref_gen_{{}}_ids.npy") for base, directory, _, _ in ADAPTERS if base == BASE),
]


@pytest.mark.parametrize(("base", "adapter", "reference"), GREEDY, ids=[str(row[1:]) for row in GREEDY])
def test_greedy_continuations(base: str, adapter: str | None, reference: str) -> None:
    model = load_base(base)
    if adapter is not None:
        options = {"prefix_layout": PrefixLayout.NEW} if "prefix/" in adapter and "p261" in adapter else {}
        install_paddle_adapter(model, read_paddle_adapter(FIXTURES / adapter, model.config, **options))
    checked = 0
    for kind, ids_name in (("left", "ids_left"), ("plain", "ids")):
        if (FIXTURES / reference.format(kind)).is_file():
            rows = read_array(f"{base.replace('models', 'ref')}/{ids_name}.npy")
            expected = read_array(reference.format(kind))
            config = GenerationConfig(max_new_tokens=expected.shape[1])
            found = generate(model, [[int(i) for i in row if i != PAD] for row in rows], config)
            assert [result.tokens for result in found] == [[i for i in row if i != PAD] for row in expected.tolist()]
            checked += 1
    assert checked


def test_no_fixture_is_left_out() -> None:
    """Every directory with weights is read above, but for the checkpoints, which test_paddle_finetune.py goes on from."""
    read = {directory for directory, _ in MODELS} | {directory for _, directory, _, _ in ADAPTERS}
    there = {path.parent.relative_to(FIXTURES).as_posix() for path in FIXTURES.rglob("*.pdparams")}
    assert {directory for directory in there if not directory.startswith("checkpoints/")} == read


MERGED = [f"{LORA}/{name}/ref_merged_qkv_layer0.npy" for name in ("A_qkv_TFT", "M_qkv_TFT_headdim", "B_qkv_mergeTrue")]


@pytest.mark.parametrize("reference", present(*MERGED))
def test_merged_weights(reference: str) -> None:
    directory = (FIXTURES / reference).parent
    model = load_base(BASE)
    install_paddle_adapter(model, read_paddle_adapter(directory, model.config))
    layer: Any = model.transformer.h[0].self_attention.query_key_value
    merged = layer.merged_weight(lambda tensor: tensor, torch.float32).detach().numpy()
    assert np.abs(merged.T - np.load(FIXTURES / reference)).max() < 2e-5


@pytest.mark.parametrize("name", ["A_noproj", "A_proj", "B_noproj", "B_proj", "p261_noproj", "p261_proj"])
def test_prefix_keys_and_values(name: str) -> None:
    directory = FIXTURES / PREFIX / name
    model = load_base(BASE)
    layout = PrefixLayout.NEW if name.startswith("p261") else None
    install_paddle_adapter(model, read_paddle_adapter(directory, model.config, prefix_layout=layout))
    heads, head_dim = model.config.n_head, model.config.head_dim
    keys = np.load(directory / "ref_past_k.npy").reshape(model.config.n_layer, -1, heads, head_dim, 5)[:, 0]
    values = np.load(directory / "ref_past_v.npy").reshape(model.config.n_layer, -1, heads, 5, head_dim)[:, 0]
    assert model.transformer.prefix is not None
    for layer, (key, value) in enumerate(model.transformer.prefix()):
        assert np.abs(key.detach().numpy().transpose(0, 2, 1) - keys[layer]).max() < 2e-5
        assert np.abs(value.detach().numpy() - values[layer]).max() < 2e-5


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, np.ndarray):
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found.read().numpy(), expected)
    else:
        assert found == expected and type(found) is type(expected)


def test_unpickler_agrees_with_pythons() -> None:
    """On our own fixtures, which are safe to unpickle."""
    paths = [path for path in FIXTURES.rglob("*.pd*") if path.suffix in (".pdparams", ".pdopt")]
    assert len(paths) > 40
    for path in paths:
        assert_same(load_paddle_pickle(path), pickle.loads(path.read_bytes()))


# What paddlenlp 2.6.1's BloomTokenizer gave for the fixture's vocabulary.
PADDLE_IDS = {
    "Hello world 123, it's 4x4!": [76, 105, 112, 112, 115, 36, 123, 115, 118, 112, 104, 36, 53, 54, 55, 48, 463, 43, 119, 36, 56, 124, 56, 37],
    "  two  spaces\n\nnewlines\t tab": [36, 453, 36, 36, 119, 116, 101, 103, 328, 14, 14, 114, 105, 123, 112, 109, 114, 328, 13, 36, 120, 101, 102],
    "\u4e2d\u6587\uff0c\u6d4b\u8bd5\u3002\u6570\u5b57123\u548cABC": [261, 177, 234, 154, 139, 277, 234, 185, 143, 236, 179, 153, 231, 132, 134, 234, 153, 180, 298, 155, 53, 54, 55, 233, 150, 144, 69, 70, 71],
    "don't you're we'll I'd": [282, 114, 43, 120, 36, 125, 115, 121, 43, 268, 36, 123, 105, 43, 112, 112, 36, 77, 43, 104],
    "\u00e9 \u00e8 \u00f1 emoji \U0001f600!": [199, 173, 36, 199, 172, 36, 199, 181, 36, 105, 113, 115, 110, 109, 36, 244, 163, 156, 132, 37],
    "x=1;y=2.5": [124, 65, 53, 63, 125, 65, 54, 50, 57],
}  # fmt: skip


def test_tokenizer_repeats_paddlenlps_ids() -> None:
    directory = FIXTURES / "tokenizer_v512"
    content = build_tokenizer_json(directory, DEFAULT_SPECIAL_TOKENS, as_gpt2=True)
    tokenizer = Tokenizer(content, config={}, special_tokens=DEFAULT_SPECIAL_TOKENS, name="v512")
    for text, ids in PADDLE_IDS.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def test_fixtures_of_tokenizers_are_the_same_everywhere() -> None:
    """So that one of them stands for all in the test above."""
    reference = (FIXTURES / "tokenizer_v512" / "vocab.json").read_bytes()
    for path in Path(FIXTURES).rglob("vocab.json"):
        assert path.read_bytes() == reference
