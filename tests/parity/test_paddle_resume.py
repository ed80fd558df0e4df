"""Training goes on from PaddleNLP's checkpoints: the recorded batches give the recorded losses and weights.

The fixtures were trained on a CPU, where Paddle's layer norm has a wrong gradient if its weight is frozen: it leaves out
the multiplication by the weight (paddlepaddle 2.6.2; with a trained weight the gradient is right). LoRA and prefix
tuning freeze it. bloomlm does not repeat that, but only with it can be shown that everything else was resumed exactly;
so these tests do, and another one states how far correct gradients lead away.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.adapters.base import FullTuning, apply_adapter
from bloomlm.checkpoint.paddle.importer import ImportedRun, read_run
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.remade import LayerNorm
from tests.paddle_files import read_paddle_adapter, resume_paddle_adapter
from tests.paddle_fixtures import FIXTURES, needs_full_checkpoint, present
from tests.parity.test_paddle_fixtures import BASE, PAD, load_base

CHECKPOINTS = "checkpoints/ft_A{}/checkpoint-{}"
LEARNING_RATE, WARMUP_STEPS, TOTAL_STEPS, DECAY_RATIO, WEIGHT_DECAY = 1e-3, 1, 4, 0.1, 0.1


def learning_rate(step: int) -> float:
    """Of the update that step makes, by PaddleNLP's schedule."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * step / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (TOTAL_STEPS - WARMUP_STEPS)
    return LEARNING_RATE * (1 - (1 - DECAY_RATIO) * progress)


class FrozenLayerNorm(torch.autograd.Function):
    """Paddle's layer norm on a CPU with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        inverse = (x.var(-1, keepdim=True, correction=0) + eps).rsqrt()
        normed = (x - x.mean(-1, keepdim=True)) * inverse
        ctx.save_for_backward(normed, inverse)
        return normed * weight + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse = ctx.saved_tensors
        (g,) = gradients
        projected = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
        return projected * inverse, None, None, None


@contextmanager
def paddles_frozen_layer_norm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for norm in (nn.LayerNorm, LayerNorm):
            patch.setattr(norm, "forward", lambda s, x: FrozenLayerNorm.apply(x, s.weight, s.bias, s.eps))
        yield


def build_adamw(model: BloomForCausalLM, state: ImportedRun | None) -> torch.optim.AdamW:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p], "weight_decay": 0.0 if "bias" in name or "norm" in name else WEIGHT_DECAY}
        for name, p in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    if state is not None:
        assert state.exp_avg.keys() == trained.keys()
        for name, parameter in trained.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.updates)),
                "exp_avg": state.exp_avg[name].read().contiguous(),
                "exp_avg_sq": state.exp_avg_sq[name].read().contiguous(),
            }
    return optimizer


def replay(model: BloomForCausalLM, optimizer: torch.optim.AdamW, trace: str, steps: range) -> list[float]:
    """Differences from the recorded losses. Pads are attended, as they were; labels equal to the pad do not count."""
    differences = []
    for step in steps:
        batch = np.load(FIXTURES / "train_trace" / trace / f"train_step{step}.npz")
        ids, labels = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["labels"])
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=PAD)
        differences.append(abs(loss.item() - float(batch["loss"])))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    return differences


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).detach().abs().max()) for name in found)


def adam_tensors(model: BloomForCausalLM, optimizer: torch.optim.AdamW, key: str) -> dict[str, Tensor]:
    return {name: optimizer.state[p][key] for name, p in model.named_parameters() if p.requires_grad}


def train_fully() -> tuple[BloomForCausalLM, torch.optim.AdamW, list[float]]:
    """All four steps of the full run; also the differences from the recorded losses."""
    model = load_base(BASE)
    apply_adapter(model, FullTuning())
    optimizer = build_adamw(model, None)
    return model, optimizer, replay(model, optimizer, "A_full", range(4))


def test_full_training_repeats_the_losses() -> None:
    assert max(train_fully()[2]) < 5e-5


@needs_full_checkpoint
def test_full_training_ends_in_the_checkpoint() -> None:
    model, optimizer, _ = train_fully()
    directory = FIXTURES / CHECKPOINTS.format("", 4)
    state = read_run(directory, model.config)
    assert (state.updates, state.learning_rate) == (4, pytest.approx(learning_rate(4)))
    for key, expected in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
        tensors = {name: tensor.read() for name, tensor in expected.items()}
        assert largest_difference(adam_tensors(model, optimizer, key), tensors) < 1e-6
    # keys' biases have no gradient but rounding, of which Adam makes whole steps
    found = {n: p for n, p in model.named_parameters() if "query_key_value.bias" not in n}
    expected_model = dict(load_base(CHECKPOINTS.format("", 4)).named_parameters())
    assert largest_difference(found, {name: expected_model[name] for name in found}) < 1e-4


def resume(kind: str, step: int = 2) -> tuple[BloomForCausalLM, ImportedRun]:
    directory = FIXTURES / CHECKPOINTS.format(f"_{kind}", step)
    model = load_base(BASE)
    resume_paddle_adapter(model, read_paddle_adapter(directory, model.config))
    return model.train(), read_run(directory, model.config)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapter_training_goes_on_exactly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = resume(kind)
    assert (state.updates, state.learning_rate) == (2, pytest.approx(learning_rate(2)))
    with paddles_frozen_layer_norm(monkeypatch):
        assert max(replay(model, build_adamw(model, state), f"A_{kind}", range(2, 4))) < 5e-6


LAST_CHECKPOINTS = present(*(CHECKPOINTS.format(f"_{kind}", 4) for kind in ("lora", "prefix")))


@pytest.mark.parametrize("last", LAST_CHECKPOINTS)
def test_adapter_training_ends_in_the_last_checkpoint(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "lora" if "lora" in last else "prefix"
    model, state = resume(kind)
    optimizer = build_adamw(model, state)
    with paddles_frozen_layer_norm(monkeypatch):
        replay(model, optimizer, f"A_{kind}", range(2, 4))
    expected, expected_state = resume(kind, 4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Adam divides by small gradients, which makes more of rounding than the losses show; processors differ
    assert largest_difference(trained, {n: p for n, p in expected.named_parameters() if n in trained}) < 2e-5
    for key, tensors in (("exp_avg", expected_state.exp_avg), ("exp_avg_sq", expected_state.exp_avg_sq)):
        found = adam_tensors(model, optimizer, key)
        assert largest_difference(found, {name: tensor.read() for name, tensor in tensors.items()}) < 3e-7


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_correct_gradients_stay_close(kind: str) -> None:
    model, state = resume(kind)
    first, second = replay(model, build_adamw(model, state), f"A_{kind}", range(2, 4))
    assert first < 5e-6
    assert second < 5e-3
