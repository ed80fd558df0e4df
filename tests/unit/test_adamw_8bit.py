"""--optim adamw_8bit differs from AdamW only by the rounding of moments, and needs a quarter of the memory."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.training.adamw_8bit import BLOCK_VALUES
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import FinetuneResult, finetune
from bloomlm.training.optimizer import AdamWConfig, build_optimizer, optimizer_tensors, set_learning_rate
from bloomlm.training.resolve import Machine, resolve
from bloomlm.training.resume import read_resume_point
from tests.unit.test_paddle_finetune import write_full

LARGE, SMALL = "h.0.mlp.dense_h_to_4h.weight", "h.0.mlp.dense_h_to_4h.bias"
SHAPES = {LARGE: (50, 101), SMALL: (101,)}  # 5,050 values are 19 whole blocks and part of another
CPU = Machine(has_cuda=False, has_matplotlib=True, has_metrics=True, has_bitsandbytes=True)


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="the extra optim8bit is not installed; most of it is for GPUs")


def gradients(step: int) -> dict[str, Tensor]:
    """Gradients whose values have very different sizes, like real ones."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator) * 10 ** torch.rand(shape, generator=generator).mul(4).sub(4)
        for name, shape in SHAPES.items()
    }


def updated(optim: str, num_steps: int) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters after some updates, and the optimizer's state."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    optimizer = build_optimizer(parameters, AdamWConfig(weight_decay=0.1, optim=optim))
    set_learning_rate(optimizer, 0.01)
    for step in range(num_steps):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        optimizer.step()
    return parameters, optimizer_tensors(optimizer, parameters)


@pytest.mark.usefixtures("bitsandbytes")
def test_the_first_update_equals_that_of_adamw() -> None:
    """It starts from moments that are zero, so nothing has been rounded yet."""
    (found, _), (expected, _) = updated("adamw_8bit", 1), updated("adamw", 1)
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_moments_are_rounded_to_the_nearest_of_256_values(bitsandbytes: Any) -> None:
    (_, found), (_, expected) = updated("adamw_8bit", 1), updated("adamw", 1)
    for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        codes = found[f"optimizer/{LARGE}/{moment}_codes"].view(-1)
        scales = found[f"optimizer/{LARGE}/{moment}_scales"]
        of_block = scales.repeat_interleave(BLOCK_VALUES)[: codes.numel()]
        exact = expected[f"optimizer/{LARGE}/{moment}"].view(-1)
        for block, scale in zip(exact.split(BLOCK_VALUES), scales, strict=True):
            assert scale == pytest.approx(block.abs().max().item(), rel=1e-6)
        values = bitsandbytes.functional.create_dynamic_map(signed=signed)
        nearest = (exact / of_block - values[:, None]).abs().amin(dim=0)
        # on a CPU the kernel uses a table with finite steps, so it may narrowly miss the nearest value
        torch.testing.assert_close((exact / of_block - values[codes.long()]).abs(), nearest, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            found[f"optimizer/{SMALL}/{moment}"], expected[f"optimizer/{SMALL}/{moment}"], rtol=1e-6, atol=0
        )


@pytest.mark.usefixtures("bitsandbytes")
def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, whole_state = updated("adamw_8bit", 4)
    monkeypatch.setattr("bloomlm.training.adamw_8bit.PIECE_VALUES", 1024)  # four whole pieces and part of another
    pieces, pieces_state = updated("adamw_8bit", 4)
    assert all(torch.equal(pieces[name], whole[name]) for name in SHAPES)
    assert all(torch.equal(pieces_state[name], whole_state[name]) for name in whole_state)


def flags(output_dir: Path, **options: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "model_name_or_path": "builtin:tiny",
        "dataset_name_or_path": "builtin:dates",
        "output_dir": str(output_dir),
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 15,
        "do_train": True,
        "do_eval": False,
        "report_to": "none",
        "device": "cpu",
    }
    return TrainingConfig(**{**values, **options})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, FinetuneResult]]:
    """A run with each optimizer on the built-in model."""
    pytest.importorskip("bitsandbytes", reason="the extra optim8bit is not installed; most of it is for GPUs")
    directory = tmp_path_factory.mktemp("runs")
    return {
        optim: (directory / optim, finetune(flags(directory / optim, optim=optim))) for optim in ("adamw", "adamw_8bit")
    }


def losses(output_dir: Path) -> list[float]:
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_losses_are_close_to_those_of_adamw(runs: dict[str, tuple[Path, FinetuneResult]]) -> None:
    plain, rounded = (losses(runs[optim][0]) for optim in ("adamw", "adamw_8bit"))
    # a moment is wrong by at most 0.7% of the largest in its block, with varying sign, and so is the size of an update;
    # the losses then differ by less than that fraction of the decrease of the loss (3.4); measured were 0.03%
    fallen = plain[0] - sum(plain[-5:]) / 5
    assert rounded[:2] == pytest.approx(plain[:2], rel=1e-4), "the first update is the same"
    assert max(abs(a - b) for a, b in zip(plain, rounded, strict=True)) < 0.003 * fallen
    assert plain != rounded


def test_memory_is_a_quarter(runs: dict[str, tuple[Path, FinetuneResult]]) -> None:
    sizes = {optim: (result.train_metrics or {})["memory_bytes"]["optimizer"] for optim, (_, result) in runs.items()}
    # one byte instead of four, and four bytes of scale for 256 values; biases and norms are 1% of this model
    assert 0.25 + 1 / 256 < sizes["adamw_8bit"] / sizes["adamw"] < 0.27
    files = {
        optim: sum(path.stat().st_size for path in (directory / "checkpoint-30" / "training_state").glob("*.distcp"))
        for optim, (directory, _) in runs.items()
    }
    assert files["adamw_8bit"] < 0.3 * files["adamw"]  # torch's format adds 1 to 2 kB for each tensor


def test_a_resumed_run_gives_the_same_bits(runs: dict[str, tuple[Path, FinetuneResult]], tmp_path: Path) -> None:
    whole, out = runs["adamw_8bit"][0], tmp_path / "out"
    shutil.copytree(whole / "checkpoint-15", out / "checkpoint-15")
    result = finetune(flags(out, optim="adamw_8bit"))
    assert result.step == 30 and losses(out)[-15:] == losses(whole)[-15:]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("wrote", "reads"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_the_other_optimizers_checkpoint_is_refused(
    wrote: str, reads: str, runs: dict[str, tuple[Path, FinetuneResult]], tmp_path: Path
) -> None:
    checkpoint = str(runs[wrote][0] / "checkpoint-15")
    with pytest.raises(CheckpointError, match="does not fit this run"):
        finetune(flags(tmp_path, optim=reads, resume_from_checkpoint=checkpoint))


@pytest.mark.usefixtures("bitsandbytes")
def test_half_precision_weights_have_fp32_masters(tmp_path: Path) -> None:
    for optim in ("adamw", "adamw_8bit"):
        finetune(flags(tmp_path / optim, optim=optim, bf16=True, fp16_opt_level="O2", max_steps=10))
    # a weight that rounds to the other neighbour in bf16 differs by 0.4%
    assert losses(tmp_path / "adamw_8bit") == pytest.approx(losses(tmp_path / "adamw"), rel=0.02)


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bloomlm\[optim8bit\]"):
        resolve(flags(tmp_path, optim="adamw_8bit"), dataclasses.replace(CPU, has_bitsandbytes=False))
    with pytest.raises(ConfigError, match="--optim adamw_8bit: needs a single process, and there are 2"):
        resolve(flags(tmp_path, optim="adamw_8bit"), dataclasses.replace(CPU, world_size=2))
    write_full(tmp_path / "checkpoint-3")
    with pytest.raises(ConfigError, match="moments in float32, with which --optim adamw_8bit cannot continue"):
        read_resume_point(resolve(flags(tmp_path, optim="adamw_8bit"), CPU), tmp_path, tmp_path / "checkpoint-3")


def test_its_cost_on_a_cpu_is_reported(tmp_path: Path) -> None:
    def notices(machine: Machine) -> str:
        return "\n".join(resolve(flags(tmp_path, optim="adamw_8bit", device="auto"), machine).notices)

    assert "an update tens of times slower" in notices(CPU)
    assert "adamw_8bit" not in notices(dataclasses.replace(CPU, has_cuda=True))
