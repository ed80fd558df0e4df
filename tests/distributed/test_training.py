"""Training on many ranks compared with one: losses, norms and weights after five steps, and resuming with other degrees."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bloomlm.adapters.base import Adapter, FullTuning
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.training_state import load_training_state, save_training_state
from bloomlm.data.loader import BatchLoader
from bloomlm.parallel.data_parallel import reshard, shard_model
from bloomlm.parallel.layout import tp_part, whole_tensor
from bloomlm.parallel.mesh import ALONE, Degrees, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model
from bloomlm.training.objectives.cross_entropy import CrossEntropy, evaluate_loss
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer
from tests.distributed.models import Case, assert_close, some_examples, tiny_model, values
from tests.distributed.pool import RankPool

SETUPS = {
    "tp 2": Degrees(tp=2),
    "tp 4": Degrees(tp=4),
    "dp 2": Degrees(dp_replicate=2),
    "fsdp 2": Degrees(dp_shard=2),
    "tp 2 x fsdp 2": Degrees(tp=2, dp_shard=2),
    "tp 2 x dp 2": Degrees(tp=2, dp_replicate=2),
    "dp 2 x fsdp 2": Degrees(dp_replicate=2, dp_shard=2),
}
ALL_LINEARS = LoraConfig(r=3, target_modules=BLOCK_LINEARS)
CASES = {
    "full": Case(),
    "clipped, accumulated, smoothed": Case(max_grad_norm=0.5, accumulation=3, label_smoothing=0.1, batch_size=4),
    "lora": Case(adapter=ALL_LINEARS, max_grad_norm=0.5),
    "dora": Case(adapter=DoraConfig(r=3, target_modules=BLOCK_LINEARS), max_grad_norm=0.5),
    "rows of the embedding": Case(adapter=LoraConfig(r=3, trained_tokens=(47, 5, 20, 3, 9)), max_grad_norm=0.5),
    "prefix": Case(adapter=PrefixConfig(num_prefix_tokens=3)),
    "projected prefix": Case(adapter=PrefixConfig(num_prefix_tokens=3, prefix_projection=True), max_grad_norm=0.5),
    "post layernorm, recompute": Case(post_layernorm=True, recompute=True, max_grad_norm=0.5),
}
LENGTHS = [(3, 9), (5, 2), (1, 4), (6, 12), (2, 2), (4, 7), (2, 10), (7, 3), (2, 5), (3, 3)]
"""Ten examples, so that some ranks have fewer examples in the last batch of an epoch, or none."""


def some_trainer(case: Case, degrees: Degrees, *, stage: int = 3, learning_rate: float = 0.02) -> Trainer:
    mesh = ALONE if degrees.world_size == 1 else Mesh.over_all_ranks(degrees, "cpu")
    model = tiny_model(case)
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh, reshard_after_forward=stage == 3)
    return Trainer(
        model,
        BatchLoader(
            some_examples(LENGTHS),
            case.batch_size // degrees.dp,
            shuffle=True,
            seed=1,
            dp_degree=degrees.dp,
            dp_rank=mesh.dp_rank,
        ),
        optimizer=AdamWConfig(weight_decay=0.1, epsilon=case.epsilon),
        schedule=ScheduleConfig(learning_rate=learning_rate).over(10),
        precision=case.precision,
        config=StepConfig(
            gradient_accumulation_steps=case.accumulation,
            max_grad_norm=case.max_grad_norm,
            seed=3,
        ),
        objective=CrossEntropy(label_smoothing=case.label_smoothing),
        mesh=mesh,
    )


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    reshard(trainer.model)
    found = {}
    for name, parameter in trainer.learned.optimized.items():
        whole = whole_tensor(name, parameter, trainer.mesh)
        assert whole is not None
        found[name] = whole.clone()
    return found


def run_steps(case: Case, degrees: Degrees, stage: int = 3) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    trainer = some_trainer(case, degrees, stage=stage)
    results = [values(trainer.run_step()) for _ in range(5)]
    return results, whole_weights(trainer)


def assert_equal_results(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["skipped"] is other["skipped"] is None
        numbers = [{name: value for name, value in result.items() if name != "skipped"} for result in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=tolerance, abs=1e-7)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("name", CASES)
def test_five_steps(ranks: RankPool, name: str, setup: str) -> None:
    results, weights = run_steps(CASES[name], Degrees())
    assert len({result["loss"] for result in results}) == 5
    for found, found_weights in ranks.run(SETUPS[setup].world_size, run_steps, CASES[name], SETUPS[setup]):
        assert_equal_results(found, results)
        assert_close(found_weights, weights, 1e-4)


def test_stage_2_computes_the_same_bits_as_stage_3(ranks: RankPool) -> None:
    (three, weights), (two, others) = (
        ranks.run(2, run_steps, Case(), Degrees(dp_shard=2), stage)[0] for stage in (3, 2)
    )
    assert two == three
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("setup", ["tp 2", "dp 2", "fsdp 2", "tp 2 x fsdp 2"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_weights", [False, True])
def test_half_precision(ranks: RankPool, setup: str, half: torch.dtype, half_weights: bool) -> None:
    case = Case(precision=Precision(compute_dtype=half, half_weights=half_weights), max_grad_norm=1.0)
    exact, _ = run_steps(Case(max_grad_norm=1.0), Degrees())
    whole, _ = run_steps(case, Degrees())
    found, _ = ranks.run(SETUPS[setup].world_size, run_steps, case, SETUPS[setup])[0]
    # values are rounded at other places than on one device, but the errors must not be larger
    error = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, exact, strict=True))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(found, exact, strict=True)) < 3 * error + 0.01
    assert all(result["skipped"] is None for result in found)


def run_with_overflow(degrees: Degrees) -> tuple[list[tuple[bool, float]], bool]:
    """fp16; in the second step only the gradients of the last rank are infinite."""
    logging.disable(logging.WARNING)
    trainer = some_trainer(Case(precision=Precision(compute_dtype=torch.float16)), degrees)
    last = trainer.mesh.rank == degrees.world_size - 1
    outcomes = []
    before = whole_weights(trainer)
    stayed = True
    for step in range(3):
        handle = None
        if step == 1 and last:
            weight = trainer.model.transformer.h[0].mlp.dense_h_to_4h
            handle = weight.register_full_backward_hook(lambda m, i, o: (i[0] * float("inf"),))
        result = trainer.run_step()
        if handle is not None:
            handle.remove()
        assert trainer.loss_scale is not None
        outcomes.append((result.skipped is not None, trainer.loss_scale.value))
        after = whole_weights(trainer)
        if step == 1:
            stayed = all(torch.equal(after[name], before[name]) for name in after)
        before = after
    logging.disable(logging.NOTSET)
    return outcomes, stayed


@pytest.mark.parametrize("setup", ["tp 2", "dp 2", "fsdp 2", "tp 2 x fsdp 2"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: RankPool, setup: str) -> None:
    for outcomes, stayed in ranks.run(SETUPS[setup].world_size, run_with_overflow, SETUPS[setup]):
        assert outcomes == [(False, 32768.0), (True, 16384.0), (False, 16384.0)]
        assert stayed


def evaluation(degrees: Degrees, batch_size: int) -> dict[str, float]:
    trainer = some_trainer(Case(), degrees)
    loader = BatchLoader(
        some_examples(LENGTHS),
        batch_size,
        shuffle=False,
        dp_degree=degrees.dp,
        dp_rank=trainer.mesh.dp_rank,
    )
    return values(evaluate_loss(trainer.model, loader, Precision(), trainer.mesh))


@pytest.mark.parametrize("setup", SETUPS)
def test_eval_loss_and_accuracy(ranks: RankPool, setup: str) -> None:
    expected = evaluation(Degrees(), 3)
    assert expected["num_supervised_tokens"] == sum(target for _, target in LENGTHS)
    assert 0 < expected["token_accuracy"] < 1
    for found in ranks.run(SETUPS[setup].world_size, evaluation, SETUPS[setup], 3):
        assert found == pytest.approx(expected, rel=1e-6)


def evaluated_in_between(degrees: Degrees, evaluates: bool) -> list[dict[str, float]]:
    trainer = some_trainer(Case(), degrees)
    results = []
    for _ in range(3):
        results.append(values(trainer.run_step()))
        if evaluates:
            evaluate_loss(trainer.model, BatchLoader(some_examples(), 4, shuffle=False), Precision(), trainer.mesh)
            assert all(isinstance(p, DTensor) for p in trainer.model.parameters())  # parameters are shards again
    return results


def test_an_evaluation_changes_nothing(ranks: RankPool) -> None:
    degrees = SETUPS["tp 2 x fsdp 2"]
    runs = [ranks.run(4, evaluated_in_between, degrees, evaluates)[0] for evaluates in (False, True)]
    assert runs[0] == runs[1]


def run_and_save(case: Case, degrees: Degrees, directory: Path, saved_at: int) -> list[dict[str, float]]:
    trainer = some_trainer(case, degrees)
    results = [values(trainer.run_step()) for _ in range(saved_at)]
    weights = whole_weights(trainer)
    if trainer.mesh.is_main:
        torch.save(weights, directory / "weights.pt")
    save_training_state(directory, *trainer.state(), mesh=trainer.mesh)
    return results + [values(trainer.run_step()) for _ in range(5 - saved_at)]


def resume(case: Case, degrees: Degrees, directory: Path) -> list[dict[str, float]]:
    trainer = some_trainer(case, degrees)
    weights = torch.load(directory / "weights.pt")
    with torch.no_grad():
        for name, parameter in trainer.learned.optimized.items():
            _copy_part(name, parameter, weights[name], trainer.mesh)
    tensors, _ = trainer.state()
    trainer.load_state(tensors, load_training_state(directory, tensors))
    return [values(trainer.run_step()) for _ in range(3)]


def _copy_part(name: str, parameter: Tensor, whole: Tensor, mesh: Mesh) -> None:
    part = tp_part(name, mesh.tp_rank, mesh.degrees.tp).of(whole)
    if isinstance(parameter, DTensor):
        shards = part.chunk(mesh.degrees.dp_shard)
        index = mesh.index("dp_shard")
        if index < len(shards):
            parameter.to_local().copy_(shards[index])
    else:
        parameter.copy_(part)


@pytest.mark.parametrize("name", ["full", "lora", "dora", "rows of the embedding", "projected prefix"])
@pytest.mark.parametrize(
    "then",
    [Degrees(), Degrees(tp=2), Degrees(dp_shard=2), Degrees(dp_replicate=2), SETUPS["tp 4"], SETUPS["tp 2 x fsdp 2"]],
)
def test_resuming_on_other_degrees(ranks: RankPool, tmp_path: Path, name: str, then: Degrees) -> None:
    before = SETUPS["tp 2 x fsdp 2"]
    expected = ranks.run(4, run_and_save, CASES[name], before, tmp_path, 2)[0][2:]
    if then.world_size == 1:
        found = [resume(CASES[name], then, tmp_path)]
    else:
        found = ranks.run(then.world_size, resume, CASES[name], then, tmp_path)
    for results in found:
        if then == before:
            assert results == expected
        assert_equal_results(results, expected)


@pytest.mark.parametrize("setup", ["tp 2", "tp 4"])
@pytest.mark.parametrize("adapter", [FullTuning(), ALL_LINEARS])
def test_noise_on_embeddings_is_the_same_on_tensor_parallel_ranks(
    ranks: RankPool, setup: str, adapter: Adapter
) -> None:
    case = Case(noise_alpha=5.0, adapter=adapter)
    results, weights = run_steps(case, Degrees())
    quiet, _ = run_steps(dataclasses.replace(case, noise_alpha=0.0), Degrees())
    assert abs(results[0]["loss"] - quiet[0]["loss"]) > 1e-3
    for found, found_weights in ranks.run(SETUPS[setup].world_size, run_steps, case, SETUPS[setup]):
        assert_equal_results(found, results)
        assert_close(found_weights, weights, 1e-4)


def draw_of_rank(degrees: Degrees) -> tuple[int, float]:
    trainer = some_trainer(Case(dropout=0.2), degrees)
    trainer.run_step()
    torch.manual_seed(0)
    return trainer.mesh.dp_rank, trainer.totals.loss


def test_dropout_runs_agree_on_their_loss(ranks: RankPool) -> None:
    results = ranks.run(4, draw_of_rank, SETUPS["tp 2 x fsdp 2"])
    assert [dp_rank for dp_rank, _ in results] == [0, 0, 1, 1]
    assert len({loss for _, loss in results}) == 1
