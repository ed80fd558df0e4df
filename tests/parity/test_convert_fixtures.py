"""Files that PaddleNLP wrote, converted there and back: the same tensors, and PaddleNLP's own logits."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bloomlm.adapters.lora import LoraConfig
from bloomlm.checkpoint.adapters.convert import convert_adapter, open_adapter_conversion
from bloomlm.checkpoint.adapters.load import load_adapter, read_adapter
from bloomlm.checkpoint.convert import convert_model, open_model_conversion
from bloomlm.checkpoint.formats import FileForm
from bloomlm.checkpoint.paddle.importer import ForeignReading, PrefixLayout
from bloomlm.checkpoint.reader import load_model, open_reader, read_config
from bloomlm.cli.main import main
from bloomlm.data.tokenizer import Tokenizer
from tests.paddle_fixtures import FIXTURES
from tests.parity.test_paddle_fixtures import ADAPTERS, BASE, LORA, MODELS, PREFIX, REF, TP, difference

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning"),
]
TOLERANCE = 5e-5
NOT_TENSORS = ("StructuredToParameterName@@", "lm_head.decoder_weight")
DIRECTORIES = sorted({directory for directory, _ in MODELS})


def read_states(directory: Path) -> list[dict[str, Any]]:
    """The state dicts of a directory's files by Python's own unpickler: these fixtures are safe."""
    files = [p for p in sorted(directory.glob("*.pdparams")) if not p.name.startswith("past_key_values")]
    states = [pickle.loads(path.read_bytes()) for path in files]
    return [{name: value for name, value in state.items() if name not in NOT_TENSORS} for state in states]


def join(states: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for state in states for name, value in state.items()}


def assert_same_arrays(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


def convert(source: Path, target: Path, form: FileForm, **options: Any) -> Path:
    convert_model(open_model_conversion(source, form, **options), target, verify=True)
    return target


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_models_there_and_back(tmp_path: Path, directory: str) -> None:
    """PaddleNLP's files -> Hugging Face's -> PaddleNLP's, by tensors; ranks' files come back as ranks' files."""
    source = FIXTURES / directory
    hf = convert(source, tmp_path / "hf", FileForm.HUGGING_FACE)
    config = read_config(source)
    reader, found = open_reader(source, config), load_model(hf)
    assert {name: p.shape for name, p in found.named_parameters()} == {n: e.shape for n, e in reader.entries.items()}
    assert all(torch.equal(reader.read(name), p) for name, p in found.named_parameters())

    is_cut = directory.endswith("shards") or directory.startswith("autodist")
    degree = len(read_states(source)) if is_cut else 1
    paddle = convert(hf, tmp_path / "paddle", FileForm.PADDLE, tensor_parallel_degree=degree)
    written, expected = read_states(paddle), read_states(source)
    if directory.endswith("static_names"):
        expected = read_states(FIXTURES / directory.replace("static_names", "structured"))
    if is_cut:
        assert len(written) == len(expected) == degree
        for rank_written, rank_expected in zip(written, expected, strict=True):
            assert_same_arrays(rank_written, rank_expected)
    else:
        assert_same_arrays(join(written), join(expected))


def test_shards_are_cut_as_paddlenlp_cuts_them(tmp_path: Path) -> None:
    """From the whole file to ranks' files, where PaddleNLP wrote both."""
    paddle = convert(FIXTURES / TP / "merged", tmp_path / "tp", FileForm.PADDLE, tensor_parallel_degree=2)
    for written, expected in zip(read_states(paddle), read_states(FIXTURES / TP / "shards"), strict=True):
        assert_same_arrays(written, expected)


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_transformers_computes_paddlenlps_logits(tmp_path: Path, directory: str) -> None:
    hf = convert(FIXTURES / directory, tmp_path / "hf", FileForm.HUGGING_FACE)
    reference = next(reference for name, reference in MODELS if name == directory).format("nomask")
    ids = np.load(FIXTURES / ("ref/bloom_h64_l3_a4_div" if "div" in directory else REF) / "ids.npy")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(hf).eval()(torch.from_numpy(ids)).logits
    assert np.abs(logits.numpy() - np.load(FIXTURES / reference)).max() < TOLERANCE


def convert_fixture(directory: str, target: Path, form: FileForm, options: dict[str, Any]) -> Path:
    convert_adapter(
        open_adapter_conversion(FIXTURES / directory, form, reading=ForeignReading(**options)), target, verify=True
    )
    return target


# Of 5 virtual tokens 2 ranks cannot have equal parts.
FOR_RANKS = [(*row, 1) for row in ADAPTERS] + [(*row, 2) for row in ADAPTERS if not row[1].startswith(PREFIX)]


@pytest.mark.parametrize(
    ("base", "directory", "reference", "options", "ranks"), FOR_RANKS, ids=[f"{row[1]}-{row[4]}" for row in FOR_RANKS]
)
def test_adapters_there_and_back(
    tmp_path: Path, base: str, directory: str, reference: str, options: dict[str, Any], ranks: int
) -> None:
    """Of every era and layout -> PEFT's files -> PaddleNLP 2.6's, whole or for ranks; each gives PaddleNLP's logits."""
    hf = convert_fixture(directory, tmp_path / "hf", FileForm.HUGGING_FACE, options)
    conversion = open_adapter_conversion(hf, FileForm.PADDLE, tensor_parallel_degree=ranks)
    convert_adapter(conversion, tmp_path / "paddle", verify=True)
    is_prefix = "prefix" in directory
    for path, more in ((hf, {}), (tmp_path / "paddle", {"prefix_layout": PrefixLayout.NEW} if is_prefix else {})):
        model = load_model(FIXTURES / base)
        load_adapter(model, path, reading=ForeignReading(**more))
        assert difference(model, f"{REF}/ids.npy", reference.format("nomask")) < TOLERANCE
        if (FIXTURES / reference.format("left_mask")).is_file():
            assert difference(model, f"{REF}/ids_left.npy", reference.format("left_mask")) < TOLERANCE


@pytest.mark.parametrize(("base", "directory", "reference", "options"), ADAPTERS, ids=[a[1] for a in ADAPTERS])
def test_peft_computes_paddlenlps_logits(
    tmp_path: Path, base: str, directory: str, reference: str, options: dict[str, Any]
) -> None:
    adapter = convert_fixture(directory, tmp_path / "adapter", FileForm.HUGGING_FACE, options)
    model = AutoModelForCausalLM.from_pretrained(convert(FIXTURES / base, tmp_path / "hf", FileForm.HUGGING_FACE))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and unexpected adapter keys
        theirs = peft.PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.from_numpy(np.load(FIXTURES / REF / "ids.npy"))
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert np.abs(logits.numpy() - np.load(FIXTURES / reference.format("nomask"))).max() < TOLERANCE


@pytest.mark.parametrize("name", ["B_qkv", "B_qkv_mergeTrue", "p261_qkv", "p261_all", "p261_all_bias"])
def test_plain_lora_comes_back_as_the_same_tensors(tmp_path: Path, name: str) -> None:
    hf = convert_fixture(f"{LORA}/{name}", tmp_path / "hf", FileForm.HUGGING_FACE, {})
    convert_adapter(open_adapter_conversion(hf, FileForm.PADDLE), tmp_path / "paddle")
    assert_same_arrays(join(read_states(tmp_path / "paddle")), join(read_states(FIXTURES / LORA / name)))


@pytest.mark.parametrize("name", ["p261_noproj", "p261_proj"])
def test_new_prefixes_come_back_as_the_same_files(tmp_path: Path, name: str) -> None:
    """The state dict bit for bit, the configuration, and pre_caches.npy, which is computed."""
    source, paddle = FIXTURES / PREFIX / name, tmp_path / "paddle"
    hf = convert_fixture(
        f"{PREFIX}/{name}", tmp_path / "hf", FileForm.HUGGING_FACE, {"prefix_layout": PrefixLayout.NEW}
    )
    convert_adapter(open_adapter_conversion(hf, FileForm.PADDLE), paddle)
    assert_same_arrays(join(read_states(paddle)), join(read_states(source)))
    assert (paddle / "prefix_config.json").read_text().split() == (source / "prefix_config.json").read_text().split()
    found, expected = np.load(paddle / "pre_caches.npy"), np.load(source / "pre_caches.npy")
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_old_lora_is_block_structured_and_of_twice_the_rank(tmp_path: Path) -> None:
    hf = convert_fixture(f"{LORA}/A_qkv_TFT", tmp_path / "hf", FileForm.HUGGING_FACE, {})
    adapter = read_adapter(hf, read_config(FIXTURES / BASE))
    assert isinstance(adapter.config, LoraConfig)
    assert (adapter.config.r, adapter.config.alpha) == (8, 16.0)  # of r 4 and lora_alpha 8
    for name, tensor in adapter.tensors.items():
        if name.endswith("lora_B"):
            first, second, third = tensor.chunk(3)
            assert not first[:, 4:].any() and first[:, :4].all()
            assert not second.any()
            assert not third[:, :4].any() and third[:, 4:].all()


def test_tokenizer_travels(tmp_path: Path) -> None:
    for flags, is_paddles in (((), False), (("--paddle_tokenization",), True)):
        with pytest.raises(SystemExit) as stopped:
            main(["convert", "--input", str(FIXTURES / BASE), "--output", str(tmp_path / "hf"), *flags])
        assert not stopped.value.code
        expected = Tokenizer.from_directory(FIXTURES / BASE, as_gpt2=is_paddles)
        theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
        for text in ("Hello world 123, it's 4x4!", "x=1;y=2.5", "\u5c0f\u660e\u6709\u5341\u4e2a"):
            assert theirs(text)["input_ids"] == expected.encode(text)
