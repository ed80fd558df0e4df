"""From the part of a parameter that a rank holds to the whole: gathered, or described for torch's checkpoints."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from bloomlm.parallel.layout import dealt_rows, tp_dim, tp_part
from bloomlm.parallel.mesh import Mesh


def whole_tensor(name: str, tensor: Tensor, mesh: Mesh, receiver: int | None = None) -> Tensor | None:
    """Gather a parameter, or a tensor that is cut like it (its gradient, its optimizer state).

    Every rank must call this for the same tensors in the same order. Memory: one whole tensor on the receiver, twice
    that for a matrix that is cut by columns; on other ranks with FSDP, the part of this tensor-parallel rank.

    Args:
        name: of the parameter.
        tensor: what this rank holds.
        mesh: the ranks.
        receiver: the rank that gets it, one of the first copy of the model; None: all ranks.

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
    # pieces lie one after another, so that rows of the whole need no second copy
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
    """The tensor with FSDP's shards gathered; what tensor parallelism cut stays cut."""
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole_shape(name: str, tensor: Tensor, mesh: Mesh) -> tuple[int, ...]:
    """The shape of the whole of which this rank holds a part."""
    return tp_part(name, mesh.tp_rank, mesh.degrees.tp).whole_shape(tuple(tensor.shape))


def global_tensor(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """The same memory as a DTensor that knows its place in the whole, so that other degrees can read what is saved.

    Args:
        name: of the parameter that the tensor is cut like.
        tensor: what this rank holds.
        mesh: the ranks.
    """
    if mesh.is_alone:
        return tensor
    dim = tp_dim(name)
    over_tp: Placement = Replicate() if dim is None else Shard(dim)
    over_dp: Placement = Replicate()
    whole = torch.Size(whole_shape(name, tensor, mesh))
    if isinstance(tensor, DTensor):
        over_dp, tensor = Shard(0), tensor.to_local()
    return DTensor.from_local(
        tensor,
        mesh.state_mesh,
        [Replicate(), over_tp, over_dp],
        run_check=False,
        shape=whole,
        stride=torch.empty(whole, device="meta").stride(),
    )


Bounds = tuple[tuple[int, int], ...]


def own_bounds(name: str, tensor: Tensor, mesh: Mesh) -> Bounds:
    """The place of a rank's tensor in the whole: for each dimension, the first index and the one after the last.

    Args:
        name: of the parameter.
        tensor: the part that this rank holds; may be on the meta device.
        mesh: the ranks.
    """
    part = tp_part(name, mesh.tp_rank, mesh.degrees.tp)
    bounds = [part.bounds(size * part.count) if dim == part.dim else (0, size) for dim, size in enumerate(tensor.shape)]
    if isinstance(tensor, DTensor):
        start, stop = dealt_rows(tensor.shape[0], mesh.index("dp_shard"), mesh.degrees.dp_shard)
        bounds[0] = bounds[0][0] + start, bounds[0][0] + stop
    return tuple(bounds)


def holding(parameter: Tensor, local: Tensor) -> Tensor:
    """A tensor in place of a rank's parameter.

    Args:
        parameter: a plain tensor or FSDP's DTensor.
        local: the new content of this rank, plain.
    """
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
