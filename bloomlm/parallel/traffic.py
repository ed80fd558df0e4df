"""What ranks send in a training step, computed from the shape of the model, and the least that any program must send.

The payload of a collective is the tensor that it sums or completes. A rank of a ring of k ranks sends 2 (k - 1) / k of
the payload for an all-reduce, and half of that for an all-gather or a reduce-scatter; no algorithm sends less
(Patarasuk and Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002).

Tensor parallelism must exchange, in the format of the matrix products, two all-reduces of [N, D] per block forward and
two backward, one of [N, D] for the embedding and one of [M, D] for the head; and three fp32 numbers for each supervised
token. FSDP must gather each weight once forward, and again backward if it was freed, and sum each gradient once.

Shapes: N packed tokens, M supervised ones, D hidden, L blocks, P virtual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import Degrees
from bloomlm.parallel.plan import GRADIENT_BYTES, rank_numel
from bloomlm.parallel.workload import Workload, block_linears

Operation = Literal["all-reduce", "all-gather", "reduce-scatter"]
_FP32, _FP64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The collectives of one kind in a whole step."""

    what: str
    """Purpose, in a few words."""
    operation: Operation
    axis: str
    """An axis of the mesh, or "all" for all ranks."""
    num_ranks: int
    """Ranks along that axis."""
    payload_bytes: int
    """Size of the tensors that are summed or completed, in a step."""
    least_bytes: int
    """Size of the tensors that any program must exchange for this purpose."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends."""
        return sent_bytes(self.operation, self.payload_bytes, self.num_ranks)

    @property
    def least_sent_bytes(self) -> float:
        """Bytes that each rank must at least send."""
        return sent_bytes(self.operation, self.least_bytes, self.num_ranks)


@dataclass(frozen=True, kw_only=True)
class Links:
    """Speeds at which a rank computes and sends."""

    flops_per_second: float
    """Speed of matrix products."""
    node_bytes_per_second: float
    """Between two ranks of one machine, in one direction."""
    network_bytes_per_second: float
    """Between ranks of different machines, in one direction."""
    ranks_per_node: int
    """Ranks of a machine."""

    def bytes_per_second(self, axis: str, degrees: Degrees) -> float:
        """Speed along an axis: the network's, if a group of ranks along the axis spans machines."""
        span = {"tp": degrees.tp, "dp_shard": degrees.tp * degrees.dp_shard}.get(axis, degrees.world_size)
        fits = span <= self.ranks_per_node and (self.ranks_per_node % span == 0 or degrees.world_size == span)
        return self.node_bytes_per_second if fits else self.network_bytes_per_second


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of a step in seconds, by cause."""

    computing: float
    """Matrix products."""
    tensor_parallelism: float
    """Exchanges that a matrix product waits for."""
    data_parallelism: float
    """Exchanges that may overlap with computing."""

    @property
    def shortest(self) -> float:
        """Time with the greatest possible overlap."""
        return max(self.computing + self.tensor_parallelism, self.data_parallelism)

    @property
    def longest(self) -> float:
        """Time without any overlap."""
        return self.computing + self.tensor_parallelism + self.data_parallelism


def sent_bytes(operation: str, payload_bytes: float, num_ranks: int) -> float:
    """Bytes that a rank of a ring sends for a payload."""
    share = (num_ranks - 1) / num_ranks
    return payload_bytes * share * (2 if operation == "all-reduce" else 1)


def step_traffic(
    model: BloomForCausalLM, degrees: Degrees, load: Workload, *, label_smoothing: bool = False
) -> list[Traffic]:
    """Everything that a rank exchanges in a step.

    Args:
        model: the whole model with its adapter, in the dtype that its weights will have; may be on the meta device.
        degrees: ranks along each axis.
        load: the work of one rank in a step.
        label_smoothing: whether the loss uses it, which adds a fourth number for each supervised token.
    """
    found = []
    if degrees.tp > 1:
        found += _tensor_parallel(model, degrees.tp, load, label_smoothing)
    if degrees.dp_shard > 1:
        found += _sharded(model, degrees, load)
    elif degrees.dp_replicate > 1:
        found.append(_replicated(model, degrees, 1))
    if degrees.dp > 1:
        axes = {"dp_replicate": degrees.dp_replicate, "dp_shard": degrees.dp_shard}
        counts = 3 * _FP64 + _FP32  # tokens, tokens with a label, terms of the loss; loss
        found += [_all_reduce("counts and loss", axis, k, counts, counts) for axis, k in axes.items() if k > 1]
    if degrees.world_size > 1:
        found.append(_all_reduce("gradient norm", "all", degrees.world_size, _FP64, _FP64))
    return found


def scoring_traffic(model: BloomForCausalLM, degrees: Degrees, load: Workload) -> list[Traffic]:
    """Everything that a rank exchanges in a step's forward passes without gradients, one for each microbatch.

    Args:
        model: as in step_traffic.
        degrees: ranks along each axis.
        load: the scored documents of one rank in a step; the head computes the log-probabilities of their labels.
    """
    found = []
    if degrees.tp > 1:
        half, stream = load.compute_dtype.itemsize, model.transformer.dtype.itemsize
        row = load.num_tokens * model.config.hidden_size
        summed = [linear for block in block_linears(model) for linear in block if not linear.is_column]
        low_rank = load.num_tokens * sum(linear.lora_rank for linear in summed)
        fixed = (len(summed) * row + low_rank) * half + _prefix_numel(model)[0] * stream
        fixed += 3 * load.num_supervised_tokens * _FP32
        payload, least = (load.accumulation * (fixed + row * size) for size in (stream, half))
        found.append(_all_reduce("scored answers", "tp", degrees.tp, payload, least))
    if degrees.dp_shard > 1:
        sizes = (_gathered_bytes(model, each, load) for each in (degrees, Degrees(tp=degrees.tp)))
        payload, least = (kept + freed * load.accumulation for kept, freed in sizes)
        found.append(_along_shards("weights for scores", "all-gather", degrees, payload, least))
    return found


def step_time(traffic: Sequence[Traffic], degrees: Degrees, links: Links, flops: float) -> StepTime:
    """How long a step takes at given speeds.

    Args:
        traffic: everything that a rank exchanges in the step.
        degrees: ranks along each axis.
        links: the speeds.
        flops: operations of the step for one copy of the model, which its tensor-parallel ranks share.
    """
    seconds = {"tp": 0.0, "dp": 0.0}
    for item in traffic:
        if item.axis == "all":
            continue  # the time of a single number is latency, which is unknown here
        speed = links.bytes_per_second(item.axis, degrees)
        seconds["tp" if item.axis == "tp" else "dp"] += item.sent_bytes / speed
    return StepTime(
        computing=flops / degrees.tp / links.flops_per_second,
        tensor_parallelism=seconds["tp"],
        data_parallelism=seconds["dp"],
    )


def _tensor_parallel(model: BloomForCausalLM, tp: int, load: Workload, label_smoothing: bool) -> list[Traffic]:
    config = model.config
    half, stream = load.compute_dtype.itemsize, model.transformer.dtype.itemsize
    row, supervised = load.num_tokens * config.hidden_size, load.num_supervised_tokens
    linears = [linear for block in block_linears(model) for linear in block]
    backward = sum(linear.needs_input_gradient for linear in linears if linear.is_column)
    # recompute stops before the last sum of a block, unless an adapter follows it
    again = sum(linear.kind == "dense" or linear.lora_rank > 0 for linear in linears if not linear.is_column)
    # [N, R]: gradients of column-cut layers, sums of row-cut layers, the latter twice with recompute
    times = {True: 1, False: 1 + load.recompute}
    low_rank = load.num_tokens * sum(linear.lora_rank * times[linear.is_column] for linear in linears)
    prefix = sum(_prefix_numel(model))
    scalars = 4 if label_smoothing else 3
    blocks = 2 * config.n_layer * row * half
    items = {
        "blocks forward": (blocks, blocks),
        "blocks recomputed": (again * load.recompute * row * half, 0),
        "blocks backward": (backward * row * half, backward * row * half),
        "embedding": (row * stream, row * half),
        "head backward": (supervised * config.hidden_size * _FP32, supervised * config.hidden_size * half),
        "loss": (scalars * supervised * _FP32, scalars * supervised * _FP32),
        "LoRA": (low_rank * half, low_rank * half),
        "prefix": (prefix * stream, prefix * stream),
    }
    return [
        _all_reduce(what, "tp", tp, payload * load.accumulation, least * load.accumulation)
        for what, (payload, least) in items.items()
        if payload
    ]


def _prefix_numel(model: BloomForCausalLM) -> tuple[int, int]:
    """Number of elements that a prefix exchanges forward, the sums of a projection, and backward, its gradients."""
    prefix = cast(Any, model.transformer.prefix)
    if prefix is None:
        return 0, 0
    flat = model.transformer.num_virtual_tokens * 2 * model.config.n_layer * model.config.hidden_size
    if prefix.transform is None:
        return 0, flat
    return flat, flat + int(prefix.embedding.weight.numel())


def _gathered_bytes(model: BloomForCausalLM, degrees: Degrees, load: Workload) -> tuple[int, int]:
    """Bytes of the weights that stay gathered after a forward pass, and of those that are freed."""
    kept = freed = 0
    for name, parameter in model.named_parameters():
        # FSDP pads the parts of the last ranks to the size of the first
        size = rank_numel(name, parameter, degrees) * degrees.dp_shard * parameter.itemsize
        if name.startswith("transformer.h.") and load.reshards:
            freed += size
        else:
            kept += size
    return kept, freed


def _gradient_bytes(model: BloomForCausalLM, degrees: Degrees) -> int:
    """Bytes of the gradients that FSDP sums, padded like the weights."""
    learned = [item for item in model.named_parameters() if item[1].requires_grad]
    return sum(rank_numel(*item, degrees) for item in learned) * degrees.dp_shard * GRADIENT_BYTES


def _sharded(model: BloomForCausalLM, degrees: Degrees, load: Workload) -> list[Traffic]:
    exact = Degrees(tp=degrees.tp)
    once, twice = _gathered_bytes(model, degrees, load)
    exact_once, exact_twice = _gathered_bytes(model, exact, load)
    learned, exact_learned = (_gradient_bytes(model, each) for each in (degrees, exact))

    times = load.accumulation
    forward, least = ((kept + freed) * times for kept, freed in ((once, twice), (exact_once, exact_twice)))
    found = [_along_shards("weights forward", "all-gather", degrees, forward, least)]
    if twice:
        found.append(_along_shards("weights backward", "all-gather", degrees, twice * times, exact_twice * times))
    found.append(_along_shards("gradients", "reduce-scatter", degrees, learned * times, exact_learned))
    if degrees.dp_replicate > 1:
        found.append(_replicated(model, degrees, times))
    return found


def _replicated(model: BloomForCausalLM, degrees: Degrees, times: int) -> Traffic:
    payload = _gradient_bytes(model, degrees) // degrees.dp_shard
    return _all_reduce("gradients of replicas", "dp_replicate", degrees.dp_replicate, payload * times, payload)


def _all_reduce(what: str, axis: str, num_ranks: int, payload_bytes: int, least_bytes: int) -> Traffic:
    return Traffic(
        what=what,
        operation="all-reduce",
        axis=axis,
        num_ranks=num_ranks,
        payload_bytes=payload_bytes,
        least_bytes=least_bytes,
    )


def _along_shards(what: str, operation: Operation, degrees: Degrees, payload_bytes: int, least_bytes: int) -> Traffic:
    return Traffic(
        what=what,
        operation=operation,
        axis="dp_shard",
        num_ranks=degrees.dp_shard,
        payload_bytes=payload_bytes,
        least_bytes=least_bytes,
    )
