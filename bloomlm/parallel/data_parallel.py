"""Data parallelism: ranks that learn from different examples and keep the same model.

Replicated ranks sum their gradients after the backward pass. Sharded ranks (FSDP2, torch's fully_shard) each hold a
part of every parameter, gradient and optimizer state. A block is gathered while the block before it is computed, and
its gradients are reduced to the ranks that hold their parts. Both can be combined: shards within a group, replicas
across groups. Gradients are sums and not means, because the loss is already divided by the tokens of all ranks.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import sys
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bloomlm.errors import ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.shard import own_part
from bloomlm.parallel.layout import tp_dim
from bloomlm.parallel.mesh import Mesh

BUCKET_BYTES = 64 * 2**20
"""Approximate size of the buffers in which replicated ranks sum gradients."""


def shard_model(model: BloomForCausalLM, mesh: Mesh, *, reshard_after_forward: bool = True) -> None:
    """Keep only this rank's shard of every parameter, in place; does nothing if the mesh has no shards.

    Args:
        model: cut for tensor parallelism, with its adapter; parameters may be on the meta device.
        mesh: the ranks.
        reshard_after_forward: free a block's gathered weights after its forward pass and gather them again for the
            backward pass (stage 3). False keeps them (stage 2), which is faster and takes more memory.

    Raises:
        ConfigError: this version of PyTorch cannot sum gradients, only average them.
    """
    if mesh.degrees.dp_shard == 1:
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # slow; most runs have no shards

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(f"--sharding needs PyTorch 2.9 or later; found {torch.__version__}")
    assert mesh.device_mesh is not None
    axes = ("dp_replicate", "dp_shard") if mesh.degrees.dp_replicate > 1 else ("dp_shard",)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh.device_mesh[axes], mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # the loss needs the embedding after the forward pass, so it stays gathered until the end of the backward pass
    fully_shard(model.transformer, mesh=mesh.device_mesh[axes], mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass without backward pass left gathered, so that parameters are shards again."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # nobody has sharded anything
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def add_up_gradients(gradients: Iterable[Tensor], mesh: Mesh) -> None:
    """Sum gradients over replicated ranks, in place; FSDP sums over sharded ranks itself."""
    if mesh.degrees.dp_replicate == 1 or mesh.degrees.dp_shard > 1:
        return
    group = mesh.group("dp_replicate")
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(tensor.nbytes for tensor in bucket) >= BUCKET_BYTES:
            _add_up(bucket, group)
            bucket = []
    _add_up(bucket, group)


def global_norm(gradients: Mapping[str, Tensor], mesh: Mesh) -> Tensor:
    """The norm of the gradients of the whole model; bitwise the same on every rank.

    Args:
        gradients: this rank's gradients by the name of their parameter, summed over data-parallel ranks.
        mesh: the ranks.

    Returns:
        Scalar; infinite or NaN on all ranks if a gradient is so on one.
    """
    if mesh.is_alone:
        return torch.nn.utils.get_total_norm(list(gradients.values()))
    counted = []
    for name, gradient in gradients.items():
        # a gradient that all tensor-parallel ranks hold counts once
        if tp_dim(name) is not None or mesh.tp_rank == 0:
            counted.append(own_part(gradient))
    if mesh.index("dp_replicate") > 0:
        counted = []
    norm = torch.nn.utils.get_total_norm(counted).double()
    assert mesh.device_mesh is not None
    return mesh.sum_over(norm.to(mesh.device_mesh.device_type) ** 2).sqrt()


def _add_up(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], group=group)
    elif tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
