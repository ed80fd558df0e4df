"""THE table: how tensor-parallel ranks cut every parameter of BLOOM, and how whole tensors come from their parts.

query_key_value and dense_h_to_4h are cut by outputs, dense and dense_4h_to_h by inputs. Each such pair then needs one
all-reduce forward and one backward (Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053, section 3). Rows of
query_key_value are ordered (head, 3, head_dim), so an equal contiguous cut gives every rank whole heads. The embedding,
which is also the head, is cut by rows of the vocabulary. A parameter that is not cut is whole on every rank. The
tensors that an adapter adds to a layer are cut together with its weight: see UPDATE_LAYOUT.
"""

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bloomlm.model.shard import is_shard
from bloomlm.parallel.mesh import Mesh

Bounds = tuple[tuple[int, int], ...]
"""For each dimension of a tensor, the first index of a part and the index after its last."""

# Parameter -> the dimension that is cut; None: whole on every rank. L stands for the number of any block.
LAYOUT: dict[str, int | None] = {
    "transformer.word_embeddings.weight": 0,
    "transformer.word_embeddings_layernorm.weight": None,
    "transformer.word_embeddings_layernorm.bias": None,
    "transformer.h.L.input_layernorm.weight": None,
    "transformer.h.L.input_layernorm.bias": None,
    "transformer.h.L.self_attention.query_key_value.weight": 0,
    "transformer.h.L.self_attention.query_key_value.bias": 0,
    "transformer.h.L.self_attention.dense.weight": 1,
    "transformer.h.L.self_attention.dense.bias": None,
    "transformer.h.L.post_attention_layernorm.weight": None,
    "transformer.h.L.post_attention_layernorm.bias": None,
    "transformer.h.L.mlp.dense_h_to_4h.weight": 0,
    "transformer.h.L.mlp.dense_h_to_4h.bias": 0,
    "transformer.h.L.mlp.dense_4h_to_h.weight": 1,
    "transformer.h.L.mlp.dense_4h_to_h.bias": None,
    "transformer.ln_f.weight": None,
    "transformer.ln_f.bias": None,
}
PATTERNS = {re.compile(re.escape(name).replace(r"\.L\.", r"\.\d+\.")): dim for name, dim in LAYOUT.items()}

# Tensor that an adapter adds to a linear layer -> {dimension along which the layer's weight is cut: dimension along
# which this tensor is cut}. If the dimension of the weight is not listed, the tensor is whole on every rank.
UPDATE_LAYOUT = {
    "lora_A": {1: 1},
    "lora_B": {0: 0},
    "lora_B_learns": {0: 0},
    "lora_magnitude_vector": {0: 0},
    "trained_rows": {},
    "trained_tokens": {},
}

# The projection of a prefix is cut like the MLP of a block; its embedding is whole on every rank.
PREFIX = "transformer.prefix."
PREFIX_LAYOUT: dict[str, int | None] = {
    "embedding.weight": None,
    "transform.0.weight": 0,
    "transform.0.bias": 0,
    "transform.2.weight": 1,
    "transform.2.bias": None,
}


def tp_dim(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks cut a parameter; None: each rank has the whole.

    Args:
        name: name of a parameter of BLOOM or of an adapter, as in model.named_parameters().

    Raises:
        KeyError: neither has such a parameter.
    """
    if name.startswith(PREFIX):
        return PREFIX_LAYOUT[name.removeprefix(PREFIX)]
    base, _, kind = name.rpartition(".")
    if kind in UPDATE_LAYOUT:
        weight_dim = tp_dim(f"{base}.weight")
        return None if weight_dim is None else UPDATE_LAYOUT[kind].get(weight_dim)
    for pattern, dim in PATTERNS.items():
        if pattern.fullmatch(name):
            return dim
    raise KeyError(f"{name} is not a parameter of BLOOM or of an adapter")


def is_of_base(name: str) -> bool:
    """Whether a parameter belongs to BLOOM itself and not to an adapter."""
    return any(pattern.fullmatch(name) for pattern in PATTERNS)


@dataclass(frozen=True)
class Part:
    """One of `count` equal, contiguous parts of a tensor."""

    dim: int | None
    """The dimension that is cut; None: the part is the whole tensor."""
    index: int
    """Number of this part, from 0."""
    count: int
    """Number of parts."""

    def bounds(self, size: int) -> tuple[int, int]:
        """The first index of the part along dim, which has `size` indices in all, and the index after its last."""
        assert size % self.count == 0, (size, self.count)
        rows = size // self.count
        return self.index * rows, (self.index + 1) * rows

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a whole tensor, as a view."""
        if self.dim is None:
            return tensor
        start, stop = self.bounds(tensor.shape[self.dim])
        return tensor.narrow(self.dim, start, stop - start)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part, from the shape of the whole."""
        return tuple(size // self.count if dim == self.dim else size for dim, size in enumerate(whole))

    def whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole, from the shape of the part."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(part))


def tp_part(name: str, tp_rank: int, tp_degree: int) -> Part:
    """The part of a parameter that a tensor-parallel rank holds."""
    return Part(tp_dim(name), tp_rank, tp_degree)


def dealt_rows(num_rows: int, index: int, count: int) -> tuple[int, int]:
    """The first row that FSDP gives to rank `index` of `count`, and the row after its last.

    As in torch.chunk, the last ranks may get fewer rows than the first, or none.
    """
    size = -(-num_rows // count)
    return min(num_rows, size * index), min(num_rows, size * (index + 1))


def whole_tensor(name: str, tensor: Tensor, mesh: Mesh, receiver: int | None = None) -> Tensor | None:
    """Gather a parameter, or a tensor that is cut like it (its gradient, its optimizer state).

    Every rank must call this for the same tensors in the same order. The receiver needs memory for one whole tensor, or
    for two if the tensor is cut along its second dimension. With FSDP, each of the other ranks needs memory for the
    part of its tensor-parallel rank.

    Args:
        name: name of the parameter.
        tensor: this rank's part.
        mesh: the ranks.
        receiver: the rank that gets the tensor, one of mesh.ranks_of_first_copy; None: all ranks.

    Returns:
        The whole tensor; None on ranks that are not the receiver.
    """
    tensor = without_shards(tensor)
    if mesh.is_alone:
        return tensor
    part = tp_part(name, mesh.tp_rank, mesh.degrees.tp)
    if part.dim is None or part.count == 1:
        return tensor if receiver in (None, mesh.rank) else None
    group = mesh.group("tp")
    if receiver is not None and receiver not in dist.get_process_group_ranks(group):
        return None
    # the pieces are contiguous in memory, so a tensor that is cut by rows needs no second copy
    stacked = None
    if receiver in (None, mesh.rank):
        stacked = tensor.new_empty((part.count, *tensor.shape))
    pieces = None if stacked is None else list(stacked.unbind(0))
    if receiver is None:
        dist.all_gather(pieces, tensor.contiguous(), group=group)
    else:
        dist.gather(tensor.contiguous(), pieces, dst=receiver, group=group)
    if stacked is None:
        return None
    return stacked.flatten(0, 1) if part.dim == 0 else torch.cat(list(stacked.unbind(0)), dim=part.dim)


def without_shards(tensor: Tensor) -> Tensor:
    """The tensor gathered over FSDP's ranks; it stays cut for tensor parallelism."""
    with torch.no_grad():
        return tensor.full_tensor() if is_shard(tensor) else tensor.detach()


def whole_shape(name: str, tensor: Tensor, mesh: Mesh) -> tuple[int, ...]:
    """The shape of the whole parameter, of which `tensor` is this rank's part."""
    return tp_part(name, mesh.tp_rank, mesh.degrees.tp).whole_shape(tuple(tensor.shape))


def global_tensor(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """The same memory as a DTensor that knows its place in the whole, so a saved state can be read with other degrees.

    `name` is the parameter that the tensor is cut like.
    """
    if mesh.is_alone:
        return tensor
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    dim = tp_dim(name)
    over_tp: Placement = Replicate() if dim is None else Shard(dim)
    over_dp: Placement = Replicate()
    whole = torch.Size(whole_shape(name, tensor, mesh))
    if is_shard(tensor):
        over_dp, tensor = Shard(0), tensor.to_local()
    return DTensor.from_local(
        tensor,
        mesh.state_mesh,
        [Replicate(), over_tp, over_dp],
        run_check=False,
        shape=whole,
        stride=torch.empty(whole, device="meta").stride(),
    )


def own_bounds(name: str, tensor: Tensor, mesh: Mesh) -> Bounds:
    """The place of `tensor`, this rank's part of a parameter, in the whole parameter."""
    part = tp_part(name, mesh.tp_rank, mesh.degrees.tp)
    bounds = [part.bounds(size * part.count) if dim == part.dim else (0, size) for dim, size in enumerate(tensor.shape)]
    if is_shard(tensor):
        start, stop = dealt_rows(tensor.shape[0], mesh.index("dp_shard"), mesh.degrees.dp_shard)
        bounds[0] = bounds[0][0] + start, bounds[0][0] + stop
    return tuple(bounds)


def holding(parameter: Tensor, local: Tensor) -> Tensor:
    """This rank's new content of a parameter, `local`, in the form of the parameter (plain, or FSDP's DTensor)."""
    if not is_shard(parameter):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
