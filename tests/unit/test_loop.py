"""The training step and loop on tiny models, by value."""

import dataclasses
import logging
import math
import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.data.example import Example
from bloomlm.data.loader import Batch, BatchLoader, collate
from bloomlm.errors import TrainingError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.training.loop import LoopConfig, train
from bloomlm.training.objectives.cross_entropy import evaluate_loss
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.results import StepLog, StepResult
from bloomlm.training.step import StepConfig, Trainer, step_seed, steps_per_epoch
from tests.tiny_checkpoint import learned_tensors

V = 40
LENGTHS = [(3, 9), (5, 2), (1, 4), (6, 12), (2, 2), (4, 7), (2, 10), (7, 3)]
"""Source and target lengths, chosen so that a mean of means differs from the mean over all tokens."""
FP16_O1 = Precision(compute_dtype=torch.float16)


def tiny_model(adapter: Adapter | None = None, dropout: float = 0.0, seed: int = 0) -> BloomForCausalLM:
    config = BloomConfig(
        vocab_size=V,
        hidden_size=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )
    model = BloomForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    apply_adapter(model, adapter or FullTuning(), torch.Generator().manual_seed(seed + 1))
    return model


def some_examples(repeats: int = 1) -> list[Example]:
    generator = np.random.default_rng(5)
    return [
        Example.pair(generator.integers(4, V, source + target).astype(np.int32), source)
        for source, target in LENGTHS * repeats
    ]


def some_trainer(
    model: BloomForCausalLM,
    *,
    batch_size: int = 4,
    examples: Sequence[Example] | None = None,
    precision: Precision | None = None,
    learning_rate: float = 0.01,
    shuffle: bool = False,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
    **step: Any,
) -> Trainer:
    return Trainer(
        model,
        BatchLoader(list(examples or some_examples()), batch_size, shuffle=shuffle, seed=1),
        optimizer=AdamWConfig(weight_decay=weight_decay, epsilon=epsilon),
        schedule=ScheduleConfig(learning_rate=learning_rate).over(100),
        precision=precision or Precision(),
        config=StepConfig(**step),
    )


def weights(model: BloomForCausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal_weights(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


def recorded_gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A dictionary that the next update fills with the gradients that the optimizer sees."""
    seen: dict[str, Tensor] = {}

    def step() -> None:
        seen.update({name: p.grad.clone() for name, p in trainer.learned.optimized.items() if p.grad is not None})

    monkeypatch.setattr(trainer.optimizer, "step", step)
    return seen


def oracle_gradients(model: BloomForCausalLM, examples: Sequence[Example]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over supervised tokens and its gradients, from logits and cross entropy of one example at a time."""
    total, count = torch.zeros(()), 0
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        logits = model(tokens[None, :-1])[0]
        first = example.num_source_tokens - 1
        total = total + F.cross_entropy(logits[first:], tokens[first + 1 :], reduction="sum")
        count += len(tokens) - 1 - first
    model.zero_grad(set_to_none=True)
    (total / count).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(total.detach() / count), gradients


@pytest.mark.parametrize(
    "adapter", [FullTuning(), LoraConfig(r=2), PrefixConfig(num_prefix_tokens=3, prefix_projection=True)]
)
@pytest.mark.parametrize("batch_size", [8, 3])
def test_gradients_equal_those_of_single_examples(
    adapter: Adapter, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(adapter)
    with torch.no_grad():
        for parameter in learned_tensors(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    loss, expected = oracle_gradients(model, some_examples())
    trainer = some_trainer(model, batch_size=batch_size, gradient_accumulation_steps=3, max_grad_norm=0.0)
    seen = recorded_gradients(trainer, monkeypatch)
    result = trainer.run_step()
    assert_equal_weights(seen, expected, 2e-6)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert result.num_supervised_tokens == sum(target for _, target in LENGTHS)
    assert result.num_tokens == sum(source + target - 1 for source, target in LENGTHS)


def test_accumulation_equals_one_large_batch() -> None:
    large, small = tiny_model(), tiny_model()
    # the gradient of the key's bias is only rounding error, which AdamW with its usual epsilon would amplify
    options = {"examples": some_examples(3), "epsilon": 1e-3}
    trainers = [
        some_trainer(large, batch_size=8, **options),
        some_trainer(small, batch_size=2, gradient_accumulation_steps=4, **options),
    ]
    for _ in range(3):
        results = [trainer.run_step() for trainer in trainers]
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert_equal_weights(weights(small), weights(large), 2e-6)
    assert (weights(large)["transformer.ln_f.weight"] - 1).abs().max() > 0.01


def test_recompute_changes_nothing() -> None:
    plain, recomputed = tiny_model(dropout=0.2), tiny_model(dropout=0.2)
    recomputed.transformer.recompute = True
    for model in (plain, recomputed):
        trainer = some_trainer(model)
        for _ in range(2):
            trainer.run_step()
    assert_equal_weights(weights(recomputed), weights(plain))


def test_the_last_step_of_an_epoch_takes_the_remaining_batches() -> None:
    trainer = some_trainer(tiny_model(), batch_size=3, gradient_accumulation_steps=2)
    supervised = [trainer.run_step().num_supervised_tokens for _ in range(4)]
    targets = [target for _, target in LENGTHS]
    assert supervised == [sum(targets[:6]), sum(targets[6:])] * 2
    assert trainer.epoch == 2.0
    assert steps_per_epoch(5, 2) == 3 and steps_per_epoch(4, 2) == 2


@pytest.mark.parametrize("max_grad_norm", [0.25, 1e6, 0.0])
def test_clipping(max_grad_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    _, expected = oracle_gradients(model, some_examples()[:4])
    trainer = some_trainer(model, max_grad_norm=max_grad_norm)
    seen = recorded_gradients(trainer, monkeypatch)
    result = trainer.run_step()
    assert result.grad_norm > 0.5
    factor = 0.25 / result.grad_norm if max_grad_norm == 0.25 else 1.0
    assert_equal_weights(seen, {name: g * factor for name, g in expected.items()}, 2e-6)


def test_gradients_do_not_include_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    _, expected = oracle_gradients(model, some_examples()[:4])
    trainer = some_trainer(model, precision=FP16_O1, max_grad_norm=0.5)
    seen = recorded_gradients(trainer, monkeypatch)
    result = trainer.run_step()
    exact_norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert result.grad_norm == pytest.approx(exact_norm, rel=0.01) and exact_norm > 0.5
    assert_equal_weights(seen, {name: g * 0.5 / exact_norm for name, g in expected.items()}, 3e-3)


def test_only_the_adapter_changes() -> None:
    for adapter in (LoraConfig(r=2), PrefixConfig(num_prefix_tokens=2)):
        model = tiny_model(adapter)
        before = weights(model)
        trainer = some_trainer(model, weight_decay=0.1)
        for _ in range(2):
            trainer.run_step()
        moved = {name for name, w in weights(model).items() if not torch.equal(w, before[name])}
        assert moved == set(learned_tensors(model))


def test_each_step_uses_its_learning_rate() -> None:
    model = tiny_model()
    before = weights(model)
    trainer = some_trainer(model)
    trainer.schedule = ScheduleConfig(learning_rate=0.5, warmup_steps=2).over(10)
    result = trainer.run_step()
    assert result.learning_rate == 0.0
    assert_equal_weights(weights(model), before)
    assert trainer.run_step().learning_rate == 0.25
    moved = weights(model)["transformer.ln_f.weight"] - before["transformer.ln_f.weight"]
    assert 0.1 < moved.abs().max() < 0.3


def test_fp16_overflow_skips_the_step_and_halves_the_scale(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    before = weights(model)
    trainer = some_trainer(model, precision=dataclasses.replace(FP16_O1, initial_loss_scale=2.0**40))
    assert trainer.loss_scale is not None
    with caplog.at_level(logging.WARNING):
        result = trainer.run_step()
    assert result.skipped is not None and math.isfinite(result.loss)
    assert "step 1: the gradient norm is" in caplog.text
    assert trainer.loss_scale.value == 2.0**39
    assert_equal_weights(weights(model), before)
    assert trainer.optimizer.state[trainer.learned.optimized["transformer.ln_f.weight"]]["step"] == 0
    skipped = 1
    while trainer.run_step().skipped is not None:
        skipped += 1
    assert 10 < skipped < 30 and trainer.non_finite_steps == 0
    assert trainer.loss_scale.value == 2.0 ** (40 - skipped)
    assert trainer.totals.skipped_steps == skipped
    assert not torch.equal(weights(model)["transformer.ln_f.weight"], before["transformer.ln_f.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half_weights", [False, True])
def test_half_precision_follows_fp32(dtype: torch.dtype, half_weights: bool) -> None:
    precision = Precision(compute_dtype=dtype, half_weights=half_weights)
    exact, half = tiny_model(), tiny_model().to(precision.weights_dtype)
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), half.parameters(), strict=True):
            ours.copy_(theirs)
    losses = []
    for model, numbers in ((exact, Precision()), (half, precision)):
        trainer = some_trainer(model, precision=numbers, gradient_accumulation_steps=2)
        losses.append([trainer.run_step().loss for _ in range(8)])
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert all(p.dtype is precision.weights_dtype for p in half.parameters())


def test_o2_keeps_updates_smaller_than_half_precision_can_represent() -> None:
    """Updates smaller than half a step of bf16 change the weights, because fp32 masters add them up."""
    model = tiny_model().bfloat16()
    trainer = some_trainer(
        model, precision=Precision(compute_dtype=torch.bfloat16, half_weights=True), learning_rate=4e-4
    )
    name = "transformer.ln_f.weight"
    trainer.run_step()
    assert torch.equal(weights(model)[name], torch.ones(16, dtype=torch.bfloat16))
    master = trainer.learned.optimized[name]
    assert master.dtype is torch.float32 and not torch.equal(master, torch.ones(16))
    for _ in range(30):
        trainer.run_step()
    assert not torch.equal(weights(model)[name], torch.ones(16, dtype=torch.bfloat16))
    assert torch.equal(weights(model)[name], master.detach().bfloat16())


def poison(model: BloomForCausalLM) -> None:
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(math.nan)


@pytest.mark.parametrize("precision", [Precision(), FP16_O1])
def test_nan_losses_skip_steps_and_the_tenth_ends_the_run(
    precision: Precision, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    trainer = some_trainer(model, precision=precision)
    good = trainer.run_step()
    assert good.skipped is None
    poison(model)
    before = weights(model)
    with caplog.at_level(logging.WARNING):
        for step in range(2, 11):
            result = trainer.run_step()
            assert result.skipped == "the loss is nan" and math.isnan(result.loss)
            assert f"step {step}: the loss is nan" in caplog.text
        with pytest.raises(TrainingError, match=r"step 11: the loss is nan, the 10th time in a row"):
            trainer.run_step()
    for name, weight in weights(model).items():
        assert torch.equal(weight.nan_to_num(7.0), before[name].nan_to_num(7.0))
    assert trainer.totals.mean_loss == pytest.approx(good.loss)


def test_a_finite_loss_resets_the_count_of_nan_losses() -> None:
    model = tiny_model()
    trainer = some_trainer(model)
    bias = model.transformer.ln_f.bias.detach().clone()
    poison(model)
    for _ in range(9):
        trainer.run_step()
    with torch.no_grad():
        model.transformer.ln_f.bias.copy_(bias)
    assert trainer.run_step().skipped is None
    assert trainer.non_finite_steps == 0


def test_a_run_without_anything_to_learn_is_refused() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter"):
        some_trainer(model)
    tokens = some_examples()[0].tokens
    example = Example.pair(tokens, len(tokens))
    with pytest.raises(TrainingError, match="step 1: its examples have no supervised token"):
        some_trainer(tiny_model(), examples=[example]).run_step()


@pytest.mark.parametrize(
    ("adapter", "precision"),
    [
        (FullTuning(), Precision()),
        (LoraConfig(r=2, lora_dropout=0.3), Precision()),
        (PrefixConfig(num_prefix_tokens=2, prefix_projection=True), Precision()),
        (FullTuning(), Precision(compute_dtype=torch.bfloat16, half_weights=True)),
        (FullTuning(), dataclasses.replace(FP16_O1, initial_loss_scale=2.0**20)),
    ],
)
def test_resuming_is_bit_identical(adapter: Adapter, precision: Precision) -> None:
    def fresh(seed: int) -> Trainer:
        model = tiny_model(adapter, dropout=0.1, seed=seed).to(precision.weights_dtype)
        return some_trainer(model, batch_size=3, gradient_accumulation_steps=2, shuffle=True, precision=precision)

    whole = fresh(0)
    for step in range(7):
        whole.run_step()
        if step == 2:
            tensors, values = whole.state()
            saved = {name: t.clone() for name, t in tensors.items()}
            saved_weights = weights(whole.model)
    resumed = fresh(9)
    resumed.run_step()  # must have no effect after load_state, not even an epoch that has begun
    with torch.no_grad():  # a checkpoint's weight files restore frozen weights, and weights of full tuning in fp32
        for name, parameter in resumed.model.named_parameters():
            if f"learned/{name}" not in saved:
                parameter.copy_(saved_weights[name])
        targets, _ = resumed.state()
        assert targets.keys() == saved.keys()
        for name, tensor in targets.items():
            tensor.copy_(saved[name])
    resumed.load_state(targets, values)
    assert resumed.step == 3
    for _ in range(4):
        resumed.run_step()
    assert_equal_weights(weights(resumed.model), weights(whole.model))
    assert resumed.totals == whole.totals
    assert (resumed.loss_scale is None) or vars(resumed.loss_scale) == vars(whole.loss_scale)


def test_another_seed_is_refused_on_resuming() -> None:
    tensors, values = some_trainer(tiny_model(), seed=1).state()
    with pytest.raises(TrainingError, match="seed 1, this one has 2"):
        some_trainer(tiny_model(), seed=2).load_state(tensors, values)
    assert len({step_seed(seed, step) for seed in range(5) for step in range(100)}) == 500


class Recorder:
    """Callbacks that record their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.logs: list[StepLog] = []
        self.results: list[StepResult] = []
        self.kill_at: int | None = None
        self.kills = 1
        self.kills_while_saving = 0
        self.last_evaluation: int | None = None
        """The run ends early after the evaluation of this step."""

    def on_step(self, result: StepResult) -> None:
        self.results.append(result)
        if result.step == self.kill_at:
            for _ in range(self.kills):
                os.kill(os.getpid(), signal.SIGTERM)

    def on_log(self, log: StepLog) -> None:
        self.calls.append(f"log {log.step}")
        self.logs.append(log)

    def on_evaluate(self, step: int) -> None:
        self.calls.append(f"evaluate {step}")

    def on_save(self, step: int) -> None:
        for _ in range(self.kills_while_saving):
            os.kill(os.getpid(), signal.SIGTERM)
        self.calls.append(f"save {step}")

    def ends_early(self) -> bool:
        return f"evaluate {self.last_evaluation}" in self.calls


def test_a_run_that_ends_early_saves_and_is_not_interrupted() -> None:
    recorder = Recorder()
    recorder.last_evaluation, recorder.kill_at = 4, 4
    trainer = some_trainer(tiny_model(), batch_size=3)
    config = LoopConfig(max_steps=7, logging_steps=5, eval_steps=2, save_steps=3)
    result = train(trainer, config, recorder)
    assert recorder.calls == ["evaluate 2", "save 3", "evaluate 4", "save 4"]
    assert (result.step, result.interrupted) == (4, False)
    assert train(trainer, config, recorder).num_steps == 0  # nor does it go on when it is called again


def test_callbacks_are_called_at_their_intervals() -> None:
    recorder = Recorder()
    trainer = some_trainer(tiny_model(), batch_size=3)
    result = train(trainer, LoopConfig(max_steps=5, logging_steps=2, eval_steps=4, save_steps=3), recorder)
    assert recorder.calls == ["log 2", "save 3", "log 4", "evaluate 4", "log 5", "evaluate 5", "save 5"]
    assert [r.step for r in recorder.results] == [1, 2, 3, 4, 5]
    first = recorder.results[:2]
    mean = sum(r.loss * r.num_supervised_tokens for r in first) / sum(r.num_supervised_tokens for r in first)
    log = recorder.logs[0]
    assert log.loss == pytest.approx(mean) and log.grad_norm == first[1].grad_norm
    assert log.learning_rate == trainer.schedule(1) and log.epoch == pytest.approx(2 / 3)
    seconds = sum(r.step_seconds for r in first)
    assert log.tokens_per_second == pytest.approx(sum(r.num_tokens for r in first) / seconds)
    assert log.eta_seconds == pytest.approx(3 * seconds / 2)
    assert log.num_supervised_tokens == sum(r.num_supervised_tokens for r in first)
    assert recorder.logs[-1].total_tokens == sum(r.num_tokens for r in recorder.results) == result.total_tokens
    assert recorder.logs[-1].num_supervised_tokens == recorder.results[-1].num_supervised_tokens
    assert 10e6 < log.peak_memory_bytes < 100e9
    assert result.step == 5 and not result.interrupted
    assert train(trainer, LoopConfig(max_steps=5), recorder).num_steps == 0


@pytest.mark.parametrize(("save_steps", "expected"), [(None, ["save 3"]), (3, ["save 3"]), (2, ["save 2", "save 3"])])
def test_sigterm_saves_and_ends(save_steps: int | None, expected: list[str]) -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        recorder = Recorder()
        recorder.kill_at = 3
        trainer = some_trainer(tiny_model())
        result = train(trainer, LoopConfig(max_steps=8, save_steps=save_steps), recorder)
        assert recorder.calls == expected
        assert result.interrupted and result.step == 3
        assert received == []
        recorder.kills = recorder.kills_while_saving = 2
        recorder.kill_at = 5
        result = train(trainer, LoopConfig(max_steps=8), recorder)
        assert recorder.calls == [*expected, "save 5"]
        assert result.interrupted and result.step == 5
        assert received == []  # repeated signals have no effect, even while saving
        recorder.kill_at, recorder.kills_while_saving = None, 0
        assert not train(trainer, LoopConfig(max_steps=8), recorder).interrupted
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]  # the earlier handler is restored
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_evaluation_weights_tokens_and_not_batches_equally() -> None:
    model = tiny_model().train()
    examples = some_examples()
    expected, _ = oracle_gradients(model.eval(), examples)
    correct = total = 0
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        first = example.num_source_tokens - 1
        likeliest = model(tokens[None, :-1])[0, first:].argmax(1)
        correct += int((likeliest == tokens[first + 1 :]).sum())
        total += len(likeliest)
    model.train()
    batches: list[Batch] = [collate(examples[:5]), collate(examples[5:])]
    result = evaluate_loss(model, batches, Precision())
    assert model.training
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.token_accuracy == correct / total and result.num_supervised_tokens == total
    half = evaluate_loss(model, batches, Precision(compute_dtype=torch.bfloat16))
    assert half.loss == pytest.approx(expected, rel=0.02) and half.loss != result.loss
    with pytest.raises(TrainingError, match="no token with a label"):
        evaluate_loss(model, [], Precision())
