"""FSDP's shards of parameters, told apart without importing what only they need.

`torch.distributed.tensor` takes half as long to import as torch itself, and a process without FSDP never needs it.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is one of FSDP's, a DTensor; as long as nobody has imported that class, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: of a shard the plain tensor in it, otherwise the tensor itself."""
    return tensor.to_local() if is_shard(tensor) else tensor


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor, of which every rank has the whole, or this rank's part of it into another."""
    if is_shard(target):
        from torch.distributed.tensor import distribute_tensor

        whole = own_part(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    own_part(target).copy_(whole)
