"""`bloomlm merge` gives one plain directory of the same model."""

from pathlib import Path

import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.checkpoint.adapters.peft import save_adapter
from bloomlm.checkpoint.reader import load_model
from bloomlm.cli.main import main
from tests.tiny_checkpoint import learned_tensors


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *arguments])
    return int(stopped.value.code or 0)


def test_lora_is_added_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    model = load_model("builtin:tiny", dtype=torch.float32)
    apply_adapter(model, LoraConfig(r=3, target_modules=BLOCK_LINEARS))
    with torch.no_grad():
        for tensor in learned_tensors(model).values():
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    (tmp_path / "lora").mkdir()
    save_adapter(model, tmp_path / "lora", "builtin:tiny")
    output = tmp_path / "merged"
    arguments = ("--model_name_or_path", "builtin:tiny", "--lora_path", str(tmp_path / "lora"))
    assert run(*arguments, "--output_path", str(output), "--max_shard_size", "1MB") == 0
    assert len(list(output.glob("model-*.safetensors"))) > 1
    merged, layer = load_model(output), model.transformer.h[1].mlp.dense_h_to_4h
    assert merged.transformer.h[1].mlp.dense_h_to_4h.weight.dtype is torch.float16
    update = layer.scaling * (layer.lora_B @ layer.lora_A)
    expected = (layer.weight + update).to(torch.float16)
    assert torch.equal(merged.transformer.h[1].mlp.dense_h_to_4h.weight, expected)


def test_without_adapter_the_weights_are_the_same_bits(tmp_path: Path) -> None:
    assert run("--model_name_or_path", "builtin:tiny", "--output_path", str(tmp_path / "copy")) == 0
    base, copy = load_model("builtin:tiny").state_dict(), load_model(tmp_path / "copy").state_dict()
    assert base.keys() == copy.keys()
    assert all(torch.equal(base[name], copy[name]) for name in base)


def test_the_model_itself_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model_name_or_path", str(tmp_path), "--output_path", str(tmp_path)) == 2
    assert "is the model itself" in capsys.readouterr().err
