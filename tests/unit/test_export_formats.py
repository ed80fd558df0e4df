"""ONNX, OpenVINO and GGUF files, each opened by its own runtime and compared by value with the PyTorch model."""

from pathlib import Path

import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel, load
from bloomlm.errors import ConfigError, ProgramError
from bloomlm.export.parity import compare
from bloomlm.export.program import export_program
from bloomlm.model.config import BloomConfig
from bloomlm.runtime import Program
from tests.row_walk import Walk
from tests.tiny_checkpoint import random_model

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("builtin:tiny", dtype="float32")


@pytest.mark.parametrize("format", NEEDS)
def test_prefix_programs_equal_the_model(loaded: LoadedModel, tmp_path: Path, format: str) -> None:
    for module in NEEDS[format]:
        pytest.importorskip(module, reason=f"the extra {format} is not installed")
    config = BloomConfig(vocab_size=loaded.tokenizer.vocab_size, hidden_size=24, n_layer=1, n_head=3)
    model = random_model(config)
    apply_adapter(model, PrefixConfig(num_prefix_tokens=3), torch.Generator().manual_seed(1))
    path = tmp_path / "bloom"
    export_program(model, loaded.tokenizer, path, source="small", format=format, verify=False)
    program = Program(path)
    forced = torch.randint(4, config.vocab_size, (3, 5), generator=torch.Generator().manual_seed(1))
    found = compare(model, program.model, [[5], [6, 7, 8, 9], [10, 11]], forced)
    assert found.logits_error < 1e-5
    walk = Walk(model, program.model)
    walk.run(80)
    assert walk.num_checked > 50
    with pytest.raises(ProgramError, match=f"in the format {format} cannot give the logits of several tokens"):
        program.model.open_rows(1, 3).prefill([0], [[5, 6, 7]], num_logits=[2])
    beams = {"decode_strategy": "beam_search", "num_beams": 3, "max_new_tokens": 6}
    expected = LoadedModel(model, loaded.tokenizer).generate(["The", "In the beginning"], **beams)
    assert program.generate(["The", "In the beginning"], **beams) == expected
    (path.parent / ("bloom.onnx" if format == "onnx" else "bloom.bin")).write_bytes(b"")
    with pytest.raises(ProgramError, match="holds 0 bytes"):
        Program(path)


def test_gguf_refuses_what_llama_cpp_has_no_place_for(loaded: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    vocab_size = loaded.tokenizer.vocab_size
    options = {"source": "small", "format": "gguf"}
    model = random_model(BloomConfig(vocab_size=vocab_size, hidden_size=24, n_layer=1, n_head=3))
    with pytest.raises(ProgramError, match="32 neighbouring weights"):
        export_program(model, loaded.tokenizer, tmp_path / "bloom", quantization="int4", **options)
    apply_adapter(model, PrefixConfig(num_prefix_tokens=3))
    with pytest.raises(ProgramError, match="virtual tokens"):
        export_program(model, loaded.tokenizer, tmp_path / "bloom", **options)
    config = BloomConfig(
        vocab_size=vocab_size, hidden_size=24, n_layer=1, n_head=3, apply_residual_connection_post_layernorm=True
    )
    with pytest.raises(ProgramError, match="residuals before the layer norm"):
        export_program(random_model(config), loaded.tokenizer, tmp_path / "bloom", **options)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_other_formats_do_not_take(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="onnx is written in float32"):
        export_program(
            loaded.model, loaded.tokenizer, tmp_path / "bloom", source="tiny", format="onnx", quantization="int8"
        )
