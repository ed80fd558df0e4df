"""Weights that are updated within the backward pass equal, bit for bit, those that are updated after it."""

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bloomlm.checkpoint.reader import load_model
from bloomlm.data.loader import BatchLoader
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.products import uses_onednn
from bloomlm.training import update
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.resolve import Machine, resolve
from bloomlm.training.step import StepConfig, Trainer
from tests.unit import test_loop
from tests.unit.test_loop import some_examples, tiny_model

BF16 = Precision(compute_dtype=torch.bfloat16)
BF16_O2 = Precision(compute_dtype=torch.bfloat16, half_weights=True)
NUM_STEPS = 5


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny embedding has 40 rows."""
    monkeypatch.setitem(update._ROWS_AT_ONCE, "cpu", 16)


def some_trainer(
    fuses_update: bool,
    *,
    precision: Precision | None = None,
    optim: str = "adamw",
    batch_size: int = 2,
    model: BloomForCausalLM | None = None,
    recompute: bool = False,
) -> Trainer:
    precision = precision or Precision()
    model = (model or tiny_model(dropout=0.1)).to(precision.weights_dtype)
    model.transformer.recompute = recompute
    return Trainer(
        model,
        BatchLoader(some_examples(), batch_size, shuffle=True, seed=1),
        optimizer=AdamWConfig(weight_decay=0.1, optim=optim),
        schedule=ScheduleConfig(learning_rate=0.01, warmup_steps=2).over(20),
        precision=precision,
        config=StepConfig(max_grad_norm=0.0, fuses_update=fuses_update),
    )


def run(trainer: Trainer, num_steps: int = NUM_STEPS) -> list[tuple[float, float]]:
    """Loss and gradient norm of some steps."""
    return [(result.loss, result.grad_norm) for result in (trainer.run_step() for _ in range(num_steps))]


def assert_same(found: Trainer, expected: Trainer) -> None:
    """Weights, moments, counts of steps and what else a checkpoint holds."""
    for (name, one), other in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    (tensors, values), (expected_tensors, expected_values) = found.state(), expected.state()
    assert tensors.keys() == expected_tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected_tensors[key]), key
    assert values == expected_values


@pytest.mark.parametrize("precision", [Precision(), BF16, BF16_O2], ids=["fp32", "bf16 O1", "bf16 O2"])
# 2 examples have fewer supervised tokens than the hidden size, so the head's gradient is kept in factors; 8 have more
@pytest.mark.parametrize("batch_size", [2, 8])
def test_steps_equal_those_with_an_update_after_the_backward_pass(batch_size: int, precision: Precision) -> None:
    fused, separate = (some_trainer(fuses, precision=precision, batch_size=batch_size) for fuses in (True, False))
    before = [parameter.detach().clone() for parameter in fused.model.parameters()]
    numbers, expected = run(fused), run(separate)
    assert [loss for loss, _ in numbers] == [loss for loss, _ in expected]
    # the norm of the embedding's gradient is that of its blocks
    assert [norm for _, norm in numbers] == pytest.approx([norm for _, norm in expected], rel=1e-6)
    assert_same(fused, separate)
    assert not any(torch.equal(*pair) for pair in zip(before, fused.model.parameters(), strict=True))


def test_recompute_and_products_without_onednn() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(torch.ones(2, 2), torch.ones(2, 2))
        fused, separate = (some_trainer(fuses, recompute=True) for fuses in (True, False))
        run(fused)
        run(separate)
        for one, other in zip(fused.model.parameters(), separate.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # products of blocks may round otherwise


def test_moments_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra optim8bit is not installed; most of it is for GPUs")
    monkeypatch.setattr(test_loop, "V", 600)  # 9,600 values are too many for moments in fp32
    fused, separate = (some_trainer(fuses, optim="adamw_8bit") for fuses in (True, False))
    embedding = fused.model.transformer.word_embeddings.weight
    assert "exp_avg_codes" in fused.optimizer.state[embedding]
    run(fused)
    run(separate)
    assert_same(fused, separate)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_of_one_kind_resumes_with_the_other(first: bool) -> None:
    whole, begun = some_trainer(first), some_trainer(first)
    run(whole, 2 * NUM_STEPS)
    run(begun)
    saved, values = begun.state()
    saved = {key: tensor.clone() for key, tensor in saved.items()}
    resumed = some_trainer(not first)
    with torch.no_grad():  # as reading the checkpoint's files does
        for own, learned in zip(resumed.model.parameters(), begun.model.parameters(), strict=True):
            own.copy_(learned)
    tensors, _ = resumed.state()
    assert tensors.keys() == saved.keys()
    for key, tensor in tensors.items():
        tensor.copy_(saved[key])
    resumed.load_state(tensors, values)
    run(resumed)
    assert_same(resumed, whole)


def test_no_gradient_outlives_its_update() -> None:
    trainer = some_trainer(True)
    alive: list[int] = []
    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in trainer.model.parameters()))
        )
    run(trainer, 1)
    assert len(alive) == len(list(trainer.model.parameters()))
    assert max(alive) == 0  # of the embedding's, autograd has no part


def spoil(trainer: Trainer, name: str) -> None:
    """Make the gradient of the bias of a layer norm infinite, and so those of all weights before it."""
    bias = dict(trainer.model.named_parameters())[name]
    bias.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


def test_a_gradient_that_is_not_finite_reaches_no_weight(caplog: pytest.LogCaptureFixture) -> None:
    name = "transformer.h.1.input_layernorm.bias"
    trainer, sound = some_trainer(True), some_trainer(True)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    spoil(trainer, name)
    trainer.step = sound.step = 5  # after the warm-up
    with caplog.at_level(logging.WARNING):
        result = trainer.run_step()
    sound.run_step()
    assert result.skipped == "the gradient norm is inf"
    assert "only the weights whose gradients came before the first such one were updated" in caplog.text
    assert trainer.non_finite_steps == 1
    updated = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    # the backward pass goes from the head to the embedding
    assert "transformer.ln_f.weight" in updated
    assert "transformer.h.1.mlp.dense_h_to_4h.weight" in updated
    assert name not in updated
    assert not any(name.startswith("transformer.h.0.") or "word_embeddings" in name for name in updated)
    for name, parameter in sound.model.named_parameters():
        found = dict(trainer.model.named_parameters())[name]
        assert torch.equal(found, parameter if name in updated else before[name])
        count = trainer.optimizer.state[found]["step"]
        assert count == (name in updated)


def test_a_loss_that_is_not_finite_updates_nothing(caplog: pytest.LogCaptureFixture) -> None:
    trainer, sound = some_trainer(True), some_trainer(True)
    bias = trainer.model.transformer.ln_f.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(math.nan)
    with caplog.at_level(logging.WARNING):
        result = trainer.run_step()
    assert (result.skipped, math.isnan(result.grad_norm)) == ("the loss is nan", True)
    assert "so the weights were not updated" in caplog.text
    with torch.no_grad():
        bias.copy_(kept)
    sound.step = 1
    sound._next_microbatches()
    assert run(trainer) == run(sound)  # nothing of the failed step is left
    for one, other in zip(trainer.model.parameters(), sound.model.parameters(), strict=True):
        assert torch.equal(one, other)


def finetuned(directory: Path, max_grad_norm: float) -> dict[str, Tensor]:
    """The weights after a run, or after the rest of one; a norm that is never reached clips nothing."""
    config = TrainingConfig(
        model_name_or_path="builtin:tiny",
        dataset_name_or_path="builtin:dates",
        output_dir=str(directory),
        do_train=True,
        max_grad_norm=max_grad_norm,
        max_steps=4,
        save_steps=2,
        weight_decay=0.1,
        disable_tqdm=True,
        report_to="none",
    )
    finetune(config)
    return dict(load_model(directory).named_parameters())


def test_a_command_resumes_what_the_other_kind_began(tmp_path: Path) -> None:
    fused, separate = finetuned(tmp_path / "fused", 0.0), finetuned(tmp_path / "separate", 1e9)
    for name, weight in fused.items():
        assert torch.equal(weight, separate[name]), name
    for directory, other in (("fused", 1e9), ("separate", 0.0)):
        shutil.rmtree(tmp_path / directory / "checkpoint-4")
        for file in (tmp_path / directory).glob("*.safetensors"):
            file.unlink()
        for name, weight in finetuned(tmp_path / directory, other).items():
            assert torch.equal(weight, fused[name]), name


CPU = Machine(has_cuda=False, has_matplotlib=True, has_metrics=True)
NOTICE = "each weight is updated in the backward pass"
FULL: dict[str, Any] = {"train_file": "rows.json", "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("flags", "processes", "fuses"),
    [
        ({}, 1, True),
        ({"bf16": True}, 1, True),
        ({"max_grad_norm": 1.0}, 1, False),
        ({"gradient_accumulation_steps": 2}, 1, False),
        ({"fp16": True}, 1, False),
        ({"lora": True}, 1, False),
        ({"prefix_tuning": True}, 1, False),
        ({}, 2, False),
    ],
)
def test_when_updates_are_fused(flags: dict[str, Any], processes: int, fuses: bool) -> None:
    config = TrainingConfig(model_name_or_path="builtin:tiny", output_dir="out", **{**FULL, **flags})
    plan = resolve(config, dataclasses.replace(CPU, world_size=processes))
    assert plan.training is not None
    assert plan.training.step.fuses_update is fuses
    assert any(NOTICE in notice for notice in plan.notices) is fuses
