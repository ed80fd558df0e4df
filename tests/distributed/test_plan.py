"""Planned memory and traffic compared with what ranks really hold and send."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.data.answer_batch import ComparedExample, collate_judged, collate_pairs
from bloomlm.data.loader import BatchLoader, collate
from bloomlm.kernels import compiled
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.mesh import Degrees, Mesh
from bloomlm.parallel.plan import parameter_bytes
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model
from bloomlm.parallel.traffic import Traffic, scoring_traffic, step_traffic
from bloomlm.parallel.vocabulary_loss import MAX_CHUNK_BYTES
from bloomlm.parallel.workload import Workload, activation_bytes
from bloomlm.training.meter import memory_by_kind
from bloomlm.training.objectives.cross_entropy import CrossEntropy, batch_loss
from bloomlm.training.objectives.dpo import Dpo
from bloomlm.training.objectives.kto import Kto
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer
from tests.distributed.models import Case, some_examples, tiny_model
from tests.distributed.pool import RankPool

SETUPS = {
    "tp 2": Degrees(tp=2),
    "tp 4": Degrees(tp=4),
    "dp 2": Degrees(dp_replicate=2),
    "fsdp 2": Degrees(dp_shard=2),
    "fsdp 3": Degrees(dp_shard=3),
    "tp 2 x fsdp 2": Degrees(tp=2, dp_shard=2),
    "dp 2 x fsdp 2": Degrees(dp_replicate=2, dp_shard=2),
}
O1 = Precision(compute_dtype=torch.bfloat16)
O2 = Precision(compute_dtype=torch.bfloat16, half_weights=True)
CASES = {
    "full": Case(),
    "lora": Case(adapter=LoraConfig(r=3, target_modules=BLOCK_LINEARS)),
    "lora of one layer": Case(adapter=LoraConfig(r=3, target_modules=("dense",))),
    "prefix": Case(adapter=PrefixConfig(num_prefix_tokens=3)),
    "projected prefix": Case(adapter=PrefixConfig(num_prefix_tokens=3, prefix_projection=True)),
    "recompute": Case(recompute=True),
    "recomputed lora": Case(recompute=True, adapter=LoraConfig(r=3, target_modules=BLOCK_LINEARS)),
    "smoothed, accumulated": Case(label_smoothing=0.1, accumulation=2),
    "bf16 O1": Case(precision=O1),
    "bf16 O2": Case(precision=O2),
    "lora in bf16 O1": Case(precision=O1, adapter=LoraConfig(r=3)),
}
LENGTH, SOURCE = 12, 5
compiled.load_operators()
LOADED = compiled.operators()
needs_causal = pytest.mark.skipif(
    LOADED is None or LOADED.causal is None, reason="there is no C++ compiler, or no AVX2"
)
BATCH_SIZE = 2


def workload(case: Case, *, reshards: bool = True) -> Workload:
    return Workload(
        num_documents=BATCH_SIZE,
        num_tokens=BATCH_SIZE * (LENGTH - 1),  # the last token is no input
        num_supervised_tokens=BATCH_SIZE * (LENGTH - SOURCE),
        compute_dtype=case.precision.compute_dtype,
        max_chunk_bytes=MAX_CHUNK_BYTES,
        recompute=case.recompute,
        accumulation=case.accumulation,
        reshards=reshards,
    )


def equal_examples(count: int) -> list[Any]:
    return some_examples([(SOURCE, LENGTH - SOURCE)] * count)


def some_trainer(case: Case, degrees: Degrees, *, reshards: bool = True) -> Trainer:
    mesh = Mesh.over_all_ranks(degrees, "cpu")
    model = tiny_model(case)
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh, reshard_after_forward=reshards)
    return Trainer(
        model,
        BatchLoader(equal_examples(32), BATCH_SIZE, shuffle=False, dp_degree=degrees.dp, dp_rank=mesh.dp_rank),
        optimizer=AdamWConfig(),
        schedule=ScheduleConfig(learning_rate=0.01).over(10),
        precision=case.precision,
        config=StepConfig(gradient_accumulation_steps=case.accumulation),
        objective=CrossEntropy(label_smoothing=case.label_smoothing),
        mesh=mesh,
    )


def held_bytes(case: Case, degrees: Degrees) -> dict[str, int]:
    trainer = some_trainer(case, degrees)
    trainer.run_step()
    return memory_by_kind(trainer, 0)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("name", ["full", "lora", "prefix", "projected prefix", "bf16 O2"])
def test_weights_gradients_and_optimizer(ranks: RankPool, name: str, setup: str) -> None:
    case, degrees = CASES[name], SETUPS[setup]
    found = ranks.run(degrees.world_size, held_bytes, case, degrees)[0]
    weights, gradients, optimizer = parameter_bytes(tiny_model(case).to("meta"), degrees)
    expected = (found["weights"], found["gradients"], found["optimizer"])
    assert (weights, gradients, optimizer) == expected


# operation -> its names, of which PyTorch has one or both; FSDP calls the first that exists
COLLECTIVES = {
    "all-reduce": ("all_reduce",),
    "all-gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
}
Payloads = dict[tuple[str, int], int]


@contextmanager
def counted(payloads: Payloads) -> Iterator[None]:
    """Sums the payload of collectives by operation and number of ranks."""
    names = {operation: next(n for n in names if hasattr(dist, n)) for operation, names in COLLECTIVES.items()}
    real = {operation: getattr(dist, name) for operation, name in names.items()}

    def counting(operation: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
            key = (operation, dist.get_world_size(options.get("group")))
            payloads[key] = payloads.get(key, 0) + max(tensor.nbytes for tensor in tensors)
            return real[operation](*arguments, **options)

        return call

    for operation, name in names.items():
        setattr(dist, name, counting(operation))
    try:
        yield
    finally:
        for operation, name in names.items():
            setattr(dist, name, real[operation])


def step_payloads(case: Case, degrees: Degrees, reshards: bool) -> Payloads:
    trainer = some_trainer(case, degrees, reshards=reshards)
    trainer.run_step()
    payloads: Payloads = {}
    with counted(payloads):
        trainer.run_step()
    return payloads


def planned_payloads(traffic: list[Traffic]) -> Payloads:
    found: Payloads = {}
    for item in traffic:
        key = (item.operation, item.num_ranks)
        found[key] = found.get(key, 0) + item.payload_bytes
    return found


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("name", CASES)
def test_sent_bytes(ranks: RankPool, name: str, setup: str) -> None:
    case, degrees = CASES[name], SETUPS[setup]
    found = ranks.run(degrees.world_size, step_payloads, case, degrees, True)[0]
    model = tiny_model(case).to("meta")
    traffic = step_traffic(model, degrees, workload(case), label_smoothing=case.label_smoothing > 0)
    assert found == planned_payloads(traffic)
    # above the least are only recompute, gradients in full precision, and the padding of FSDP's last part
    assert all(item.payload_bytes >= item.least_bytes for item in traffic)


def test_stage_2_gathers_once(ranks: RankPool) -> None:
    case, degrees = CASES["full"], SETUPS["fsdp 2"]
    found = ranks.run(2, step_payloads, case, degrees, False)[0]
    model = tiny_model(case).to("meta")
    assert found == planned_payloads(step_traffic(model, degrees, workload(case, reshards=False)))


def scored_payloads(case: Case, degrees: Degrees, reshards: bool) -> Payloads:
    """What the pass over other answers sends in a step with KTO."""
    mesh = Mesh.over_all_ranks(degrees, "cpu")
    model = tiny_model(case)
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh, reshard_after_forward=reshards)
    answers = [
        ComparedExample(**vars(example), other=example, is_desirable=True, reference=(0.0, 0.0))
        for example in equal_examples(BATCH_SIZE)
    ]
    payloads: Payloads = {}
    with counted(payloads):
        Kto(beta=0.1).step_sums(model, [collate_judged(answers)] * case.accumulation, case.precision)
    return payloads


@pytest.mark.parametrize("setup", [name for name in SETUPS if name != "dp 2"])
@pytest.mark.parametrize("name", CASES)
def test_sent_bytes_of_scored_answers(ranks: RankPool, name: str, setup: str) -> None:
    case, degrees = CASES[name], SETUPS[setup]
    for reshards in {True, degrees.dp_shard == 1}:
        found = ranks.run(degrees.world_size, scored_payloads, case, degrees, reshards)[0]
        traffic = scoring_traffic(tiny_model(case).to("meta"), degrees, workload(case, reshards=reshards))
        assert found == planned_payloads(traffic)
        assert all(item.payload_bytes >= item.least_bytes for item in traffic)


def learned(model: BloomForCausalLM, case: Case) -> Tensor:
    return batch_loss(model, collate(equal_examples(BATCH_SIZE)), case.precision, scale=1.0)


def compared(model: BloomForCausalLM, case: Case) -> Tensor:
    """A pair, the answers of which are as long as equal_examples."""
    chosen, rejected = equal_examples(BATCH_SIZE)
    pair = ComparedExample(**vars(chosen), other=rejected, is_desirable=True, reference=(-1.0, -2.0))
    return Dpo().batch_loss(model, collate_pairs([pair]), case.precision, step_sums=(1,)).loss


def kept_bytes(
    case: Case, tp_degree: int, uses_operator: bool, loss_of: Callable[[BloomForCausalLM, Case], Tensor] = learned
) -> int:
    """Bytes that autograd keeps of a forward pass, besides parameters and the gradients that the loss computes."""
    model = tiny_model(case)
    if tp_degree > 1:
        mesh = Mesh.over_all_ranks(Degrees(tp=tp_degree), "cpu")
        cut_model(model, mesh)
        cut_adapter(model, mesh)
        shard_model(model, mesh)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with pytest.MonkeyPatch.context() as patch, keeping:  # undone, because later tests have the same ranks
        # without it, attention is PyTorch's, as on GPUs
        patch.setattr(compiled, "_loaded", LOADED if uses_operator else None)
        loss = loss_of(model.train(), case)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("uses_operator", [False, pytest.param(True, marks=needs_causal)])
@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("name", ["full", "lora", "lora of one layer", "prefix", "bf16 O1", "lora in bf16 O1"])
def test_activations(ranks: RankPool, name: str, tp_degree: int, uses_operator: bool) -> None:
    case, load = CASES[name], replace(workload(CASES[name]), uses_operator=uses_operator)
    found = ranks.run(tp_degree, kept_bytes, case, tp_degree, uses_operator)[0]
    model = tiny_model(case).to("meta")
    heads = model.config.n_head // tp_degree
    columns = -4 * heads if uses_operator else load.num_tokens * 3 * 8 * heads * 4  # the operator keeps slopes instead
    grad_hidden = load.num_supervised_tokens * model.config.hidden_size * 4
    planned = activation_bytes(model, tp_degree, load) - columns - grad_hidden
    assert found == planned


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_pair_keeps_what_two_examples_keep(ranks: RankPool, name: str) -> None:
    found = [ranks.run(1, kept_bytes, CASES[name], 1, False, loss)[0] for loss in (learned, compared)]
    assert found[0] <= found[1] <= found[0] + 100  # two log-probabilities, and what the loss makes of them
