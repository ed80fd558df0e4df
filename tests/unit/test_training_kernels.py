"""GELU and AdamW by our operators: values against the definitions in float64, alone and in a run."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.data.loader import BatchLoader
from bloomlm.kernels.compiled import load_operators, operators
from bloomlm.model.remade import gelu
from bloomlm.training import update
from bloomlm.training.objectives.cross_entropy import batch_loss
from bloomlm.training.one_pass_adamw import OnePassAdamW, one_pass_adamw
from bloomlm.training.optimizer import AdamWConfig, build_optimizer, is_decayed, set_learning_rate
from bloomlm.training.precision import Precision
from bloomlm.training.step import step_seed
from tests.unit.test_fused_update import BF16, BF16_O2, assert_same, run, some_trainer
from tests.unit.test_loop import some_examples, tiny_model

load_operators()
loaded = operators()
pytestmark = pytest.mark.skipif(loaded is None, reason="there is no C++ compiler, or no AVX2")

SIZES = [(1,), (7, 3), (64, 65), (5, 4096)]
"""Rows that fill vectors and pieces, and rows that do not."""


def gelu_errors(dtype: torch.dtype) -> list[float]:
    """The largest error of values and gradients in all sizes."""
    found = []
    for size in SIZES:
        generator = torch.Generator().manual_seed(1)
        x, grad = (4 * torch.randn(size, generator=generator) for _ in range(2))
        x.view(-1)[:1] = -100.0  # where an exponential would overflow
        x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
        exact = x.detach().double().requires_grad_()
        F.gelu(exact, approximate="tanh").backward(grad.double())
        out = gelu(x)
        assert "_Gelu" in type(out.grad_fn).__name__ and out.dtype is dtype
        out.backward(grad)
        assert x.grad is not None and exact.grad is not None
        pairs = (out, F.gelu(exact, approximate="tanh")), (x.grad, exact.grad)
        found += [float(((mine - right) / (1 + right.abs())).detach().abs().max()) for mine, right in pairs]
    return found


def adamw_errors(dtype: torch.dtype, *, has_masters: bool) -> list[float]:
    """The largest relative error of parameters and moments after three updates with different gradients."""
    found = []
    for size in SIZES:
        generator = torch.Generator().manual_seed(2)
        weight = nn.Parameter(torch.randn(size, generator=generator).bfloat16())
        master = nn.Parameter(weight.detach().float())
        exact = nn.Parameter(master.detach().double())
        optimizer = build_optimizer({"some.weight": master}, AdamWConfig(weight_decay=0.1))
        oracle = torch.optim.AdamW([exact], lr=0.01, weight_decay=0.1)
        set_learning_rate(optimizer, 0.01)
        updates = one_pass_adamw(optimizer, {weight: master} if has_masters else {}, torch.bfloat16)
        assert isinstance(updates, OnePassAdamW)
        for _ in range(3):
            gradient = torch.randn(size, generator=generator).to(dtype)
            found.append(abs(float(updates.norm(gradient) / gradient.double().norm()) - 1))
            for rows in (slice(0, len(master) // 2), slice(len(master) // 2, None)):
                updates.update_rows(optimizer.param_groups[0], master, rows, gradient[rows])
            optimizer.state[master]["step"] += 1
            exact.grad = gradient.double()
            oracle.step()
        assert torch.equal(weight, master.bfloat16()) is has_masters
        pairs = [(master.detach(), exact.detach())]
        pairs += [(optimizer.state[master][name], oracle.state[exact][name]) for name in ("exp_avg", "exp_avg_sq")]
        found += [float((mine - right).abs().max() / right.abs().max()) for mine, right in pairs]
    return found


def assert_small_errors() -> None:
    assert max(gelu_errors(torch.float32)) < 2e-6
    assert max(gelu_errors(torch.bfloat16)) < 2.0**-8
    for dtype in (torch.float32, torch.bfloat16):
        for has_masters in (True, False):
            assert max(adamw_errors(dtype, has_masters=has_masters)) < 1e-6


def test_values_are_those_of_the_definitions() -> None:
    assert_small_errors()


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_every_level_of_instructions_gives_the_same(level: str) -> None:
    code = "from tests.unit.test_training_kernels import assert_small_errors; assert_small_errors()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "BLOOMLM_MAX_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_nan_stays_one() -> None:
    assert gelu(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]
    assert loaded is not None and loaded.norm is not None
    for number in (math.nan, math.inf):
        assert not math.isfinite(loaded.norm(torch.tensor([1.0, number])))


@pytest.mark.parametrize("precision", [Precision(), BF16, BF16_O2], ids=["fp32", "bf16 O1", "bf16 O2"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_fused_updates_equal_those_after_the_backward_pass(batch_size: int, precision: Precision) -> None:
    fused, separate = (some_trainer(fuses, precision=precision, batch_size=batch_size) for fuses in (True, False))
    assert [loss for loss, _ in run(fused)] == [loss for loss, _ in run(separate)]
    assert_same(fused, separate)


@pytest.mark.parametrize("precision", [BF16, BF16_O2], ids=["bf16 O1", "bf16 O2"])
@pytest.mark.parametrize("fuses", [True, False])
def test_a_run_learns_as_with_the_update_of_pytorch(
    fuses: bool, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = some_trainer(fuses, precision=precision)
    losses = [loss for loss, _ in run(found)]
    monkeypatch.setattr(update, "one_pass_adamw", lambda *_: None)
    expected = some_trainer(fuses, precision=precision)
    assert losses == pytest.approx([loss for loss, _ in run(expected)], rel=2e-3)
    masters: list[dict[str, Tensor]] = [dict(trainer.learned.optimized) for trainer in (found, expected)]
    for name, master in masters[0].items():
        torch.testing.assert_close(master, masters[1][name], rtol=0, atol=4e-3)  # the rate is 0.01


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("fuses", [True, False])
def test_masters_are_those_of_plain_autograd(fuses: bool, batch_size: int) -> None:
    """The oracle adds the embedding's gradients up in bf16, copies all gradients in fp32 and updates with torch's AdamW."""
    trainer = some_trainer(fuses, precision=BF16_O2, batch_size=batch_size)
    oracle = tiny_model(dropout=0.1).bfloat16().train()
    start = {name: p.detach().float() for name, p in oracle.named_parameters()}
    masters = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    groups = [{"params": [p], "weight_decay": 0.1 * is_decayed(name)} for name, p in masters.items()]
    optimizer = torch.optim.AdamW(groups)
    loader = BatchLoader(some_examples(), batch_size, shuffle=True, seed=1)
    batches = (batch for _ in range(4) for batch in loader)
    for step, batch in zip(range(4), batches, strict=False):
        trainer.run_step()
        torch.manual_seed(step_seed(42, step))
        batch_loss(oracle, batch, BF16_O2, scale=1 / batch.num_supervised_tokens).backward()
        for name, p in oracle.named_parameters():
            assert p.grad is not None
            masters[name].grad, p.grad = p.grad.float(), None
        for group in optimizer.param_groups:
            group["lr"] = trainer.schedule(step)
        optimizer.step()
        with torch.no_grad():
            for name, p in oracle.named_parameters():
                p.copy_(masters[name])
    assert trainer.step == 4
    for name, master in trainer.learned.optimized.items():
        moved = (masters[name] - start[name]).abs().mean()
        # AdamW divides by the size of the gradient, so rounding shows where it is near zero, as of the bias of keys
        assert (master - masters[name]).abs().mean() < (0.3 if name.endswith("value.bias") else 0.05) * moved, name


def test_gradients_of_fp32_weights_reach_the_update_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, dtypes = some_trainer(True, precision=BF16), {}
    update_rows = OnePassAdamW.update_rows

    def seen(self: OnePassAdamW, group: Any, parameter: nn.Parameter, rows: slice, gradient: Tensor) -> None:
        dtypes[parameter] = gradient.dtype
        update_rows(self, group, parameter, rows, gradient)

    monkeypatch.setattr(OnePassAdamW, "update_rows", seen)
    trainer.run_step()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    assert dtypes.keys() == names.keys()
    halves = {names[parameter] for parameter, dtype in dtypes.items() if dtype is torch.bfloat16}
    linear = {name for name in names.values() if "self_attention" in name or "mlp" in name}
    assert halves == (linear if hasattr(torch.Tensor, "grad_dtype") else set())


def test_what_the_operator_does_not_take() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    master, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    one, both = build_optimizer({"w": master}, AdamWConfig()), build_optimizer({"w": master, "o": other}, AdamWConfig())
    assert one_pass_adamw(one, {weight: master}, torch.bfloat16) is None
    assert one_pass_adamw(both, {nn.Parameter(torch.ones(4, dtype=torch.bfloat16)): master}, torch.bfloat16) is None
    assert one_pass_adamw(one, {}, torch.float32) is None
    assert one_pass_adamw(one, {}, torch.bfloat16) is not None
