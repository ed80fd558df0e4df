"""Conversion between Hugging Face's and PaddleNLP's files keeps every bit and writes all files or none."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint import convert as convert_module
from bloomlm.checkpoint.adapters import convert as convert_adapter_module
from bloomlm.checkpoint.adapters.convert import convert_adapter, open_adapter_conversion
from bloomlm.checkpoint.adapters.load import load_adapter, read_adapter
from bloomlm.checkpoint.convert import convert_model, open_model_conversion
from bloomlm.checkpoint.formats import FileForm
from bloomlm.checkpoint.paddle.importer import ForeignReading, PrefixLayout
from bloomlm.checkpoint.reader import load_model, open_reader, read_config
from bloomlm.checkpoint.tensor_reader import Rows
from bloomlm.checkpoint.writer import write_model
from bloomlm.cli import display as display_module
from bloomlm.cli.display import BytesDisplay
from bloomlm.cli.main import main
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import AdapterError, CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from tests.paddle_files import (
    CONFIG,
    cut,
    is_linear_weight,
    logits,
    make_model,
    paddle_state,
    random_arrays,
    variable_names,
    write,
    write_config,
    write_json,
)
from tests.tiny_bloom import write_adapter
from tests.tiny_checkpoint import assert_equal_models, random_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIABLE_NAMES = "StructuredToParameterName@@"


def write_hf(directory: Path, dtype: torch.dtype = torch.float32) -> BloomForCausalLM:
    model = random_model(CONFIG, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    write_model(directory, model.config, model.named_parameters())
    return model


def convert(source: Path, target: Path, form: FileForm, *, verify: bool = False, **options: Any) -> None:
    convert_model(open_model_conversion(source, form, **options), target, verify=verify)


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *map(str, arguments)])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("degree", [1, 2])
def test_embedding_is_read_row_by_row(degree: int, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "paddle", FileForm.PADDLE, tensor_parallel_degree=degree)
    reader = open_reader(tmp_path / "paddle", CONFIG)
    in_rows = set()
    for name in reader.entries:
        opened = reader.open(name)
        if isinstance(opened, Rows):
            in_rows.add(name)
            assert (opened.shape, opened.dtype) == (reader.entries[name].shape, reader.entries[name].dtype)
            opened = torch.cat(list(opened.split(7)))
        assert torch.equal(opened, reader.read(name)), name
    # columns of the stored matrices are rows of the published ones: those must be whole before they can be turned over
    assert {name for name in reader.entries if name.endswith("dense.weight")}.isdisjoint(in_rows)
    assert "transformer.word_embeddings.weight" in in_rows


def load_pickle(path: Path) -> dict[str, Any]:
    """Load a file with Python's own unpickler, which is safe for a file that the test wrote."""
    return pickle.loads(path.read_bytes())


def bits(array: np.ndarray) -> bytes:
    return array.dtype.str.encode() + str(array.shape).encode() + np.ascontiguousarray(array).tobytes()


def expected_state(model: BloomForCausalLM) -> dict[str, np.ndarray]:
    """The arrays that PaddleNLP stores for a model; bfloat16 as its bits."""
    state = {}
    for name, tensor in model.state_dict().items():
        array = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()
        state[name.replace("transformer.", "bloom.", 1)] = array.T if is_linear_weight(name) else array
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_hf_to_paddle_and_back_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, degree: int) -> None:
    model = write_hf(tmp_path / "hf", dtype)
    convert(tmp_path / "hf", tmp_path / "paddle", FileForm.PADDLE, tensor_parallel_degree=degree, verify=True)
    assert_equal_models(load_model(tmp_path / "paddle"), model)
    convert(tmp_path / "paddle", tmp_path / "again", FileForm.HUGGING_FACE, verify=True)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "hf/config.json").read_text()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_file_is_the_pickle_that_paddlenlp_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_hf(tmp_path / "hf", dtype)
    convert(tmp_path / "hf", tmp_path / "paddle", FileForm.PADDLE)
    found = load_pickle(tmp_path / "paddle/model_state.pdparams")
    assert found.pop(VARIABLE_NAMES) == variable_names(CONFIG)
    expected = expected_state(model)
    assert found.keys() == expected.keys()
    assert all(bits(found[name]) == bits(expected[name]) for name in expected)
    config = json.loads((tmp_path / "paddle/config.json").read_text())
    assert config["paddlenlp_version"] is None and config["architectures"] == ["BloomForCausalLM"]
    assert config.get("dtype") == (None if dtype is torch.float32 else str(dtype).removeprefix("torch."))
    assert "tensor_parallel_degree" not in config


@pytest.mark.parametrize("degree", [2, 3, 6])
def test_each_rank_has_its_part(tmp_path: Path, degree: int) -> None:
    model = write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "paddle", FileForm.PADDLE, tensor_parallel_degree=degree)
    assert json.loads((tmp_path / "paddle/config.json").read_text())["tensor_parallel_degree"] == degree
    assert len(list((tmp_path / "paddle").glob("*.pdparams"))) == degree
    for tp_rank in range(degree):
        found = load_pickle(tmp_path / f"paddle/model_state.tp{tp_rank:02}.pdparams")
        assert found.pop(VARIABLE_NAMES) == variable_names(CONFIG)
        expected = cut(paddle_state(model), degree, tp_rank)
        assert found.keys() == expected.keys()
        assert all(bits(found[name]) == bits(expected[name]) for name in expected)


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "paddle", FileForm.PADDLE, max_shard_size_bytes=20_000)
    index = json.loads((tmp_path / "paddle/model_state.pdparams.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model_state-{i:05}-of-{len(files):05}.pdparams" for i in range(1, len(files) + 1)]
    assert len(files) > 2 and not (tmp_path / "paddle/model_state.pdparams").exists()
    expected = paddle_state(model)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    for file in files:
        found = load_pickle(tmp_path / "paddle" / file)
        assert found.pop(VARIABLE_NAMES) == {name: variable_names(CONFIG)[name] for name in found}
        for name, array in found.items():
            assert index["weight_map"][name] == file and bits(array) == bits(expected.pop(name))
    assert not expected
    assert_equal_models(load_model(tmp_path / "paddle"), model)


def test_numbers_are_rounded_once(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "hf")
    for form in FileForm:
        convert(tmp_path / "hf", tmp_path / form.value, form, dtype=torch.bfloat16, verify=True)
        assert_equal_models(load_model(tmp_path / form.value), model.to(torch.bfloat16))


def test_a_number_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 70_000.0
    (tmp_path / "hf").mkdir()
    write_model(tmp_path / "hf", CONFIG, model.named_parameters())
    for form in FileForm:
        with pytest.raises(CheckpointError, match=r"7e\+04 is too large for float16, whose largest is 65504"):
            convert(tmp_path / "hf", tmp_path / "half", form, dtype=torch.float16)
    with torch.no_grad():  # an infinity that is there already is no news
        model.transformer.ln_f.weight[3] = float("inf")
    (tmp_path / "inf").mkdir()
    write_model(tmp_path / "inf", CONFIG, model.named_parameters())
    convert(tmp_path / "inf", tmp_path / "half", FileForm.HUGGING_FACE, dtype=torch.float16)
    assert load_model(tmp_path / "half").transformer.ln_f.weight[3].isinf()


def test_blocks_of_any_size_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a", FileForm.PADDLE, tensor_parallel_degree=2)
    convert(tmp_path / "a", tmp_path / "b", FileForm.HUGGING_FACE)
    monkeypatch.setattr("bloomlm.checkpoint.safetensors_file.BLOCK_BYTES", 700)
    convert(tmp_path / "hf", tmp_path / "c", FileForm.PADDLE, tensor_parallel_degree=2)
    convert(tmp_path / "a", tmp_path / "d", FileForm.HUGGING_FACE)
    for one, other in (("a", "c"), ("b", "d")):
        for path in (tmp_path / one).iterdir():
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (FileForm.HUGGING_FACE, {"tensor_parallel_degree": 2}, "never cut for ranks.*--to paddle"),
        (FileForm.PADDLE, {"tensor_parallel_degree": 4}, "6 attention heads cannot be divided among 4"),
        (FileForm.PADDLE, {"tensor_parallel_degree": 0}, "is 0; expected at least 1"),
        (
            FileForm.PADDLE,
            {"tensor_parallel_degree": 2, "max_shard_size_bytes": 9},
            "rank is written to a file of its own",
        ),
    ],
)
def test_impossible_conversions_are_refused(
    tmp_path: Path, form: FileForm, options: dict[str, Any], message: str
) -> None:
    write_hf(tmp_path / "hf")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "hf", tmp_path / "out", form, **options)
    assert not (tmp_path / "out").exists()


def test_mixed_precision_needs_a_dtype(tmp_path: Path) -> None:
    state = paddle_state(make_model())
    state["bloom.ln_f.bias"] = state["bloom.ln_f.bias"].astype(np.float16)
    write(write_config(tmp_path / "mixed") / "model_state.pdparams", state)
    with pytest.raises(CheckpointError, match=r"mixed precision.*ln_f.bias is not; name the precision"):
        open_model_conversion(tmp_path / "mixed", FileForm.HUGGING_FACE)
    convert(tmp_path / "mixed", tmp_path / "out", FileForm.HUGGING_FACE, dtype=torch.float32)
    assert load_model(tmp_path / "out").transformer.ln_f.bias.dtype is torch.float32


def test_config_json_describes_only_the_written_files(tmp_path: Path) -> None:
    more = {"paddlenlp_version": None, "tensor_parallel_degree": 2, "architectures": ["BloomModel"], "kept": 5}
    directory = write_config(tmp_path / "paddle", **more)
    for tp_rank in range(2):
        write(directory / f"model_state.tp0{tp_rank}.pdparams", cut(paddle_state(make_model()), 2, tp_rank))
    convert(directory, tmp_path / "hf", FileForm.HUGGING_FACE)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["kept"] == 5 and config["architectures"] == ["BloomForCausalLM"]
    assert not [key for key in config if "paddle" in key or "parallel" in key]


@pytest.mark.parametrize("form", FileForm)
def test_verify_finds_a_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: FileForm) -> None:
    write_hf(tmp_path / "hf")

    def damage(path: Path) -> None:
        if path.suffix in (".safetensors", ".pdparams"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(convert_module, "leave_page_cache", damage)
    with pytest.raises(CheckpointError, match="reads back with another checksum; nothing was put in place"):
        convert(tmp_path / "hf", tmp_path / "out", form, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("form", FileForm)
def test_one_tensor_at_a_time(tmp_path: Path, form: FileForm) -> None:
    """When a tensor is read, all earlier ones have been released."""
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "paddle", FileForm.PADDLE, tensor_parallel_degree=2)
    conversion = open_model_conversion(tmp_path / "paddle", form)
    alive: list[weakref.ref[Tensor | Rows]] = []
    way = "open" if form is FileForm.HUGGING_FACE else "read"
    read = getattr(conversion.reader, way)

    def read_alone(name: str) -> Tensor | Rows:
        assert not [reference for reference in alive if reference() is not None]
        tensor: Tensor | Rows = read(name)
        alive[:] = [weakref.ref(tensor)]
        return tensor

    setattr(conversion.reader, way, read_alone)
    convert_model(conversion, tmp_path / "out", verify=True)
    assert alive


@pytest.mark.parametrize("degree", [1, 2])
def test_progress_counts_what_is_written(tmp_path: Path, degree: int) -> None:
    write_hf(tmp_path / "hf")
    conversion = open_model_conversion(tmp_path / "hf", FileForm.PADDLE, tensor_parallel_degree=degree)
    written: list[int] = []
    verified: list[int] = []
    convert_model(conversion, tmp_path / "out", verify=True, report=written.append, report_verified=verified.append)
    states = [load_pickle(path) for path in (tmp_path / "out").glob("*.pdparams")]
    arrays = [value for state in states for name, value in state.items() if name != VARIABLE_NAMES]
    assert sum(written) == sum(array.nbytes for array in arrays) == conversion.written_bytes
    assert sum(verified) == CONFIG.num_parameters * 4 == conversion.verified_bytes


SLOW = """
import sys, time
from pathlib import Path
from bloomlm.checkpoint.convert import convert_model, open_model_conversion
from bloomlm.checkpoint.formats import FileForm

def stop_half_way(num_bytes, done=[0]):
    done[0] += num_bytes
    if done[0] * 2 > conversion.written_bytes:
        print("half", flush=True)
        time.sleep(60)

conversion = open_model_conversion(Path(sys.argv[1]), FileForm(sys.argv[3]))
convert_model(conversion, Path(sys.argv[2]), report=stop_half_way)
"""


@pytest.mark.parametrize("form", FileForm)
def test_a_killed_conversion_leaves_no_partial_output_and_can_be_repeated(tmp_path: Path, form: FileForm) -> None:
    model = write_hf(tmp_path / "hf")
    older = random_model(CONFIG, seed=5)
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", CONFIG, older.named_parameters())
    for target in ("new", "out"):
        arguments = [sys.executable, "-c", SLOW, str(tmp_path / "hf"), str(tmp_path / target), form.value]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "half\n"
            os.kill(process.pid, signal.SIGKILL)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(f".{target}.")]
    assert not (tmp_path / "new").exists()
    assert_equal_models(load_model(tmp_path / "out"), older)
    for target in ("new", "out"):
        convert(tmp_path / "hf", tmp_path / target, form, verify=True)
        assert_equal_models(load_model(tmp_path / target), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "new", "out"]


def test_only_a_model_or_an_adapter_is_replaced(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds files but no model or adapter to replace"):
        convert(tmp_path / "hf", tmp_path / "notes", FileForm.PADDLE)
    write_hf(tmp_path / "run")
    (tmp_path / "run/checkpoint-9").mkdir()
    with pytest.raises(CheckpointError, match="replaced as a whole, and checkpoint-9 with it"):
        convert(tmp_path / "hf", tmp_path / "run", FileForm.PADDLE)
    assert (tmp_path / "run/checkpoint-9").is_dir() and (tmp_path / "notes/diary.txt").read_text() == "dear"


def test_a_full_disk_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    needed = CONFIG.num_parameters * 4

    def usage(free: int) -> Callable[[Any], Any]:
        return lambda path: type("Usage", (), {"free": free})

    monkeypatch.setattr(shutil, "disk_usage", usage(needed - 1))
    with pytest.raises(CheckpointError, match=r"are to be written, and .* are free there"):
        convert(tmp_path / "hf", tmp_path / "deep/er/out", FileForm.PADDLE)
    monkeypatch.setattr(shutil, "disk_usage", usage(needed))
    convert(tmp_path / "hf", tmp_path / "deep/er/out", FileForm.PADDLE)


# Adapters


def write_plain_lora(directory: Path, base: Path, **config: Any) -> Path:
    return write_adapter(directory, base, LoraConfig(**({"r": 3, "lora_alpha": 5.0} | config)))


ADAPTERS = {
    "lora": LoraConfig(r=3, lora_alpha=5.0),
    "lora on all": LoraConfig(r=2, lora_alpha=3.0, target_modules=BLOCK_LINEARS),
    "lora on dense": LoraConfig(r=2, target_modules=("dense",)),
    "lora on 4h_to_h": LoraConfig(r=2, target_modules=("dense_4h_to_h",)),
    "rslora": LoraConfig(r=3, lora_alpha=5.0, use_rslora=True),
    "prefix": PrefixConfig(num_prefix_tokens=6),
    "projection": PrefixConfig(num_prefix_tokens=6, prefix_projection=True, prefix_projection_hidden_size=18),
    "projection of the usual width": PrefixConfig(num_prefix_tokens=6, prefix_projection=True),
}


def with_adapter(base: Path, directory: Path, **options: Any) -> Tensor:
    model = load_model(base)
    load_adapter(model, directory, reading=ForeignReading(**options))
    return logits(model)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_to_paddle_and_back(tmp_path: Path, name: str, degree: int, dtype: torch.dtype) -> None:
    write_hf(tmp_path / "base")
    adapter = write_adapter(tmp_path / "peft", tmp_path / "base", ADAPTERS[name])
    layout = PrefixLayout.NEW if isinstance(ADAPTERS[name], PrefixConfig) else None
    stored = open_adapter_conversion(adapter, FileForm.PADDLE, dtype=dtype, tensor_parallel_degree=degree)
    convert_adapter(stored, tmp_path / "paddle", verify=True)
    again = open_adapter_conversion(
        tmp_path / "paddle", FileForm.HUGGING_FACE, reading=ForeignReading(prefix_layout=layout)
    )
    convert_adapter(again, tmp_path / "again", verify=True)
    assert again.adapter.tensors.keys() == stored.adapter.tensors.keys()
    for key, tensor in stored.adapter.tensors.items():
        assert again.adapter.tensors[key].dtype is dtype and torch.equal(again.adapter.tensors[key], tensor)
    if dtype is torch.float32:
        expected = with_adapter(tmp_path / "base", adapter)
        assert not torch.allclose(expected, logits(load_model(tmp_path / "base")), atol=0.01)
        found = with_adapter(tmp_path / "base", tmp_path / "paddle", prefix_layout=layout)
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(with_adapter(tmp_path / "base", tmp_path / "again"), expected, atol=5e-5, rtol=1e-5)
        assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
            adapter / "adapter_model.safetensors"
        ).read_bytes()


def test_lora_is_the_pickle_that_paddlenlp_writes(tmp_path: Path) -> None:
    write_hf(tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=5.0, target_modules=("dense", "query_key_value"))
    peft = write_adapter(tmp_path / "peft", tmp_path / "base", config)
    adapter = read_adapter(peft, CONFIG)
    for degree in (1, 3):
        conversion = open_adapter_conversion(peft, FileForm.PADDLE, tensor_parallel_degree=degree)
        convert_adapter(conversion, tmp_path / "paddle")
        values = json.loads((tmp_path / "paddle/lora_config.json").read_text())
        assert (values["r"], values["lora_alpha"], values["enable_lora_list"]) == (3, 5, None)
        assert values["tensor_parallel_degree"] == (degree if degree > 1 else -1)
        assert values["target_modules"] == [".*self_attention.query_key_value", ".*self_attention.dense"]
        for tp_rank in range(degree):
            suffix = f".tp{tp_rank:02}" if degree > 1 else ""
            state = load_pickle(tmp_path / f"paddle/lora_model_state{suffix}.pdparams")
            assert set(state.pop(VARIABLE_NAMES)) == set(state)
            for key, tensor in adapter.tensors.items():
                expected = tensor.numpy().T
                if key.endswith("query_key_value.lora_B"):
                    expected = np.split(expected, degree, axis=1)[tp_rank]
                elif key.endswith("dense.lora_A"):
                    expected = np.split(expected, degree, axis=0)[tp_rank]
                assert bits(state.pop(key.replace("transformer.", "bloom.", 1))) == bits(expected)
            assert not state


def test_prefix_is_the_pickle_that_paddlenlp_writes(tmp_path: Path) -> None:
    """Columns hold the keys of all blocks, then the values, head by head, with the flat prefix's numbers [P, L, 2, H, K]."""
    write_hf(tmp_path / "base")
    peft = write_adapter(tmp_path / "peft", tmp_path / "base", PrefixConfig(num_prefix_tokens=4))
    convert_adapter(open_adapter_conversion(peft, FileForm.PADDLE), tmp_path / "paddle")
    flat = read_adapter(peft, CONFIG).tensors["transformer.prefix.embedding.weight"].numpy()
    slots = flat.reshape(4, CONFIG.n_layer, 2, CONFIG.n_head, CONFIG.head_dim)
    state = load_pickle(tmp_path / "paddle/prefix_model_state.pdparams")
    assert state.pop(VARIABLE_NAMES) == {"0.weight": "embedding_1.w_0"}
    assert list(state) == ["0.weight"]
    assert bits(state["0.weight"]) == bits(slots.transpose(0, 2, 1, 3, 4).reshape(4, -1))
    caches = np.load(tmp_path / "paddle/pre_caches.npy")
    assert bits(caches) == bits(slots.transpose(1, 2, 3, 0, 4))


def test_trained_biases_are_converted(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(CONFIG.n_layer):
        module = f"bloom.h.{layer}.self_attention.query_key_value"
        shapes |= {f"{module}.lora_A": (24, 2), f"{module}.lora_B": (2, 72), f"{module}.bias": (72,)}
    state = random_arrays(shapes)
    write(tmp_path / "paddle/lora_model_state.pdparams", state)
    values = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": [".*query_key_value.*"]}
    write_json(tmp_path / "paddle/lora_config.json", values | {"enable_lora_list": None, "trainable_bias": "lora"})
    convert_adapter(open_adapter_conversion(tmp_path / "paddle", FileForm.HUGGING_FACE), tmp_path / "hf", verify=True)
    assert json.loads((tmp_path / "hf/adapter_config.json").read_text())["bias"] == "all"
    convert_adapter(open_adapter_conversion(tmp_path / "hf", FileForm.PADDLE), tmp_path / "again", verify=True)
    assert json.loads((tmp_path / "again/lora_config.json").read_text())["trainable_bias"] == "lora"
    found = load_pickle(tmp_path / "again/lora_model_state.pdparams")
    assert all(bits(found[name]) == bits(array) for name, array in state.items())
    expected = with_adapter(tmp_path / "base", tmp_path / "paddle")
    torch.testing.assert_close(with_adapter(tmp_path / "base", tmp_path / "hf"), expected, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(logits(base), expected, atol=0.01)


def test_a_trained_embedding_cannot_be_written_in_pefts_files(tmp_path: Path) -> None:
    write_hf(tmp_path / "base")
    module = "bloom.h.{}.self_attention.query_key_value"
    shapes: dict[str, tuple[int, ...]] = {"bloom.word_embeddings.weight": (66, 24)}
    for layer in range(CONFIG.n_layer):
        shapes |= {f"{module.format(layer)}.lora_A": (24, 2), f"{module.format(layer)}.lora_B": (2, 72)}
    state = random_arrays(shapes)
    write(tmp_path / "paddle/lora_model_state.pdparams", state)
    values = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": [".*query_key_value.*"]}
    write_json(tmp_path / "paddle/lora_config.json", values | {"enable_lora_list": None})
    with pytest.raises(AdapterError, match=r"PEFT's files cannot hold transformer.word_embeddings.weight"):
        convert_adapter(open_adapter_conversion(tmp_path / "paddle", FileForm.HUGGING_FACE), tmp_path / "hf")
    convert_adapter(open_adapter_conversion(tmp_path / "paddle", FileForm.PADDLE), tmp_path / "again", verify=True)
    assert json.loads((tmp_path / "again/lora_config.json").read_text())["trainable_modules"] == [
        r"bloom\.word_embeddings\.weight"
    ]
    found = load_pickle(tmp_path / "again/lora_model_state.pdparams")
    assert all(bits(found[name]) == bits(array) for name, array in state.items())


@pytest.mark.parametrize(
    ("adapter", "degree", "error", "message"),
    [
        (LoraConfig(r=2, rank_pattern={"h.1.self_attention.query_key_value": 3}), 1, AdapterError, "one rank and one"),
        (DoraConfig(r=2), 1, AdapterError, "PaddleNLP 2.6 has no DoRA"),
        (
            LoraConfig(r=2, alpha_pattern={"h.1.self_attention.query_key_value": 3}),
            1,
            AdapterError,
            "has 2 pairs of them",
        ),
        (PrefixConfig(num_prefix_tokens=5), 2, ConfigError, r"0.weight of shape \[5, 96\] cannot be divided among 2"),
        (PrefixConfig(num_prefix_tokens=8), 4, ConfigError, "6 heads cannot be divided among 4"),
    ],
)
def test_adapters_that_paddlenlp_lacks_are_refused(
    tmp_path: Path, adapter: LoraConfig | PrefixConfig, degree: int, error: type[Exception], message: str
) -> None:
    write_hf(tmp_path / "base")
    write_adapter(tmp_path / "peft", tmp_path / "base", adapter)
    with pytest.raises(error, match=message):
        conversion = open_adapter_conversion(tmp_path / "peft", FileForm.PADDLE, tensor_parallel_degree=degree)
        convert_adapter(conversion, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_finds_a_changed_bit_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "base")
    write_adapter(tmp_path / "peft", tmp_path / "base", LoraConfig(r=3))

    def damage(path: Path) -> None:
        if path.suffix == ".safetensors":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(convert_adapter_module, "leave_page_cache", damage)
    with pytest.raises(CheckpointError, match="reads back differently; nothing was put in place"):
        convert_adapter(open_adapter_conversion(tmp_path / "peft", FileForm.HUGGING_FACE), tmp_path / "o", verify=True)
    assert not (tmp_path / "o").exists()


def test_a_base_model_is_checked_and_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "base")
    write_adapter(tmp_path / "peft", tmp_path / "base", LoraConfig(r=3))
    base = str(tmp_path / "base")
    conversion = open_adapter_conversion(tmp_path / "peft", FileForm.HUGGING_FACE, base_model_name_or_path=base)
    convert_adapter(conversion, tmp_path / "named")
    assert json.loads((tmp_path / "named/adapter_config.json").read_text())["base_model_name_or_path"] == base
    convert_adapter(open_adapter_conversion(tmp_path / "peft", FileForm.HUGGING_FACE), tmp_path / "unnamed")
    assert json.loads((tmp_path / "unnamed/adapter_config.json").read_text())["base_model_name_or_path"] is None
    with pytest.raises(AdapterError, match="missing"):
        open_adapter_conversion(tmp_path / "peft", FileForm.HUGGING_FACE, base_model_name_or_path="builtin:tiny")


def test_a_lora_on_the_first_blocks_only_needs_its_base(tmp_path: Path) -> None:
    write_hf(tmp_path / "base")
    module = "bloom.h.0.self_attention.query_key_value"  # of 2 blocks
    state = random_arrays({f"{module}.lora_A": (24, 2), f"{module}.lora_B": (2, 72)})
    write(tmp_path / "paddle/lora_model_state.pdparams", state)
    values = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": [".*h.0.*query_key_value.*"]}
    write_json(tmp_path / "paddle/lora_config.json", values | {"enable_lora_list": None})
    expected = with_adapter(tmp_path / "base", tmp_path / "paddle")
    base = str(tmp_path / "base")
    conversion = open_adapter_conversion(tmp_path / "paddle", FileForm.HUGGING_FACE, base_model_name_or_path=base)
    convert_adapter(conversion, tmp_path / "hf", verify=True)
    torch.testing.assert_close(with_adapter(tmp_path / "base", tmp_path / "hf"), expected, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(logits(load_model(tmp_path / "base")), expected, atol=0.01)
    convert_adapter(open_adapter_conversion(tmp_path / "paddle", FileForm.HUGGING_FACE), tmp_path / "short")
    with pytest.raises(AdapterError, match=r"2 tensors are missing.*h\.1"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "short")


def test_an_absurd_block_number_is_refused(tmp_path: Path) -> None:
    name = "bloom.h.999999999.self_attention.query_key_value"
    write(tmp_path / "lora_model_state.pdparams", random_arrays({f"{name}.lora_A": (24, 2), f"{name}.lora_B": (2, 72)}))
    write_json(tmp_path / "lora_config.json", {"r": 2, "lora_alpha": 4, "enable_lora_list": None})
    with pytest.raises(AdapterError, match="holds no LoRA of BLOOM's linear layers"):
        open_adapter_conversion(tmp_path, FileForm.HUGGING_FACE)


# The command


def test_command_converts_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paddle, back = tmp_path / "paddle", tmp_path / "back"
    assert run("--input", "builtin:tiny", "--output", paddle, "--to", "paddle", "--tensor-parallel-degree", 2) == 0
    shown = capsys.readouterr()
    assert "writing 2.1 MB of 2.1 MB (100%)" in shown.err and "MB/s" in shown.err
    size = sum(path.stat().st_size for path in paddle.iterdir()) / 1e6
    assert "model of 1,055,744 parameters, float16" in shown.out
    assert f"{len(list(paddle.iterdir()))} files, {size:.1f} MB in " in shown.out and "/s)" in shown.out
    assert run("--input", paddle, "--output", back, "--verify") == 0
    shown = capsys.readouterr()
    assert "verifying 2.1 MB of 2.1 MB (100%)" in shown.err and "read back and found equal" in shown.out
    assert_equal_models(load_model(back), load_model("builtin:tiny"))
    assert Tokenizer.from_directory(back).fingerprint == Tokenizer.from_directory("bloomlm/assets/tiny").fingerprint


def test_paddles_tokenizer_files_are_copied_unchanged(tmp_path: Path) -> None:
    assert run("--input", "builtin:tiny", "--output", tmp_path / "a", "--to", "paddle") == 0
    (tmp_path / "a/tokenizer.json").unlink()
    (tmp_path / "a/added_tokens.json").write_text("{}")
    assert run("--input", tmp_path / "a", "--output", tmp_path / "b", "--to", "paddle", "--dtype", "float32") == 0
    assert not (tmp_path / "b/tokenizer.json").exists()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tiny = Tokenizer.from_directory("bloomlm/assets/tiny")
    texts = ["July 4, 1999; x4y", "a\n\nb"]  # GPT-2's expression cuts between line ends, BLOOM's does not
    for flags, is_same in (((), True), (("--paddle_tokenization",), False)):
        assert run("--input", tmp_path / "b", "--output", tmp_path / "c", *flags) == 0
        found = Tokenizer.from_directory(tmp_path / "c")
        assert (found.encode_batch(texts) == tiny.encode_batch(texts)) is is_same


def test_a_model_without_tokenizer_is_converted_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf")
    assert run("--input", tmp_path / "hf", "--output", tmp_path / "out") == 0
    assert "holds no tokenizer" in capsys.readouterr().err.replace("\n", " ")
    assert open_reader(tmp_path / "out", read_config(tmp_path / "out")).entries


def test_command_converts_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "base")
    write_adapter(tmp_path / "peft", tmp_path / "base", PrefixConfig(num_prefix_tokens=4))
    paddle, back = tmp_path / "paddle", tmp_path / "back"
    assert run("--input", tmp_path / "peft", "--output", paddle, "--to", "paddle", "--verify") == 0
    shown = capsys.readouterr().out
    assert "prefix of 4 tokens" in shown and "--prefix_path" in shown and "--prefix_layout new" in shown
    assert run("--input", paddle, "--output", back) == 2
    assert "--prefix_layout new" in capsys.readouterr().err
    assert run("--input", paddle, "--output", back, "--prefix_layout", "new", "--dtype", "float16") == 0
    found = json.loads((back / "adapter_config.json").read_text())
    assert found["peft_type"] == "PREFIX_TUNING" and found["num_virtual_tokens"] == 4


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("hf", ("--output", "hf"), "overlap"),
        ("hf", ("--output", "hf/inside"), "overlap"),
        ("hf", ("--output", "."), "overlap"),
        ("hf", ("--prefix_layout", "new"), "--prefix_layout is for adapters"),
        ("hf", ("--trained_tensor_parallel_degree", "2"), "is for adapters"),
        ("hf", ("--base_model_name_or_path", "builtin:tiny"), "is for adapters"),
        ("hf", ("--max_shard_size", "two"), "'two' is not a size"),
        ("hf", ("--paddle_tokenization",), "there is none to make"),
        ("hf", ("--to", "paddle", "--paddle_tokenization"), "there is none to make"),
        ("peft", ("--max_shard_size", "1GB"), "--max_shard_size is for models"),
        ("peft", ("--prefix_layout", "new"), "is not read as an adapter in PaddleNLP's files"),
        ("peft", ("--tensor_parallel_degree", "2"), "never cut for ranks"),
        ("both", (), "holds a model and an adapter"),
        ("nothing", (), "has no config.json"),
    ],
)
def test_flags_that_do_not_apply_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(Path("hf"))
    write_adapter(Path("peft"), Path("hf"), LoraConfig(r=2))
    shutil.copytree("hf", "both")
    shutil.copytree("peft", "both", dirs_exist_ok=True)
    Path("nothing").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run("--input", source, *(() if "--output" in flags else ("--output", "out")), *flags) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_display_prints_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    with BytesDisplay(Console(width=10)) as display:
        report = display.phase("writing", 1_000_000_000)
        display.phase("never begun", 5)
        for _ in range(1000):
            report(1_000_000)
            now[0] += 0.01
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "writing 1.0 GB of 1.0 GB (100%)  100.1 MB/s"
    assert len(lines) == 5  # one each 2 seconds of 10
    assert lines[0].startswith("writing 201.0 MB of 1.0 GB (20%)")
