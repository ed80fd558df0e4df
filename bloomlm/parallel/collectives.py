"""Differentiable exchanges among the tensor-parallel ranks.

Copying to ranks and summing over ranks are each other's gradient (Megatron-LM, https://arxiv.org/abs/1909.08053, figure
3). The input of a divided product is the same on all ranks, so its partial gradients are summed. The output is summed,
so its gradient is the same on all ranks. A sum has the same bits on all ranks, so parameters that every rank holds
whole stay equal without being compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bloomlm.model.linear import autocast_dtype
from bloomlm.model.partition import Product


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks that compute one model together."""

    group: dist.ProcessGroup
    rank: int
    """This process's number among them."""
    degree: int
    """How many they are."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over the ranks of each element, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def min(self, tensor: Tensor) -> Tensor:
        """The minimum over the ranks of each element, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
        return tensor

    def begin_sum(self, tensor: Tensor) -> dist.Work:
        """Begin to sum in place; the tensor must not be used before wait() of the result has returned."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks, which have equal shapes, concatenated along a dimension; not differentiable."""
        pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.degree)]
        dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return torch.cat(pieces, dim=dim)


def copy_to_ranks(x: Tensor, ranks: TensorParallelGroup) -> Tensor:
    """x itself; its gradient is the sum over the ranks."""
    out: Tensor = _Copy.apply(x, ranks)
    return out


def column_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, ranks: TensorParallelGroup, product: Product
) -> Tensor:
    """A product of copy_to_ranks(x): the gradient of x is summed while the other gradients are computed.

    Under autocast the sum is in the format of the product, which has half as many bytes as fp32.

    Args:
        x: [N, in], the same on every rank.
        weight: [out, in], this rank's part of the outputs.
        bias: [out].
        ranks: the ranks to sum over.
        product: computes x W^T + b.
    """
    x = x.to(autocast_dtype(x.device.type) or x.dtype)
    out: Tensor = _ColumnProduct.apply(x, weight, bias, ranks, product)
    return out


def sum_over_ranks(y: Tensor, ranks: TensorParallelGroup) -> Tensor:
    """The sum over the ranks, computed in place; the gradient passes unchanged."""
    out: Tensor = _Sum.apply(y, ranks)
    return out


def gather_last_dim(y: Tensor, ranks: TensorParallelGroup) -> Tensor:
    """The y of all ranks concatenated along the last dimension; each rank gets its part of the gradient."""
    out: Tensor = _Gather.apply(y, ranks)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallelGroup) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(grad.clone(memory_format=torch.contiguous_format)), None


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ranks: TensorParallelGroup, product: Product
    ) -> Tensor:
        ctx.ranks, ctx.product = ranks, product
        # a frozen weight does not keep x alive
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, weight, bias, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = None if weight is None else ctx.product(grad, weight.t(), None, None)
        pending = None if grad_x is None else ctx.ranks.begin_sum(grad_x)
        grad_weight = None if x is None else ctx.product(grad.t(), x.t(), None, None)
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        if pending is not None:
            pending.wait()
        return grad_x, grad_weight, grad_bias, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: TensorParallelGroup) -> Tensor:
        ctx.mark_dirty(y)
        return ranks.sum(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: TensorParallelGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(y, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.ranks.degree, dim=-1)[ctx.ranks.rank], None


@contextmanager
def own_randomness(rank: int) -> Iterator[None]:
    """Random numbers that differ among ranks whose generators are in the same state.

    They depend on that state, so recomputation draws the same numbers again. After the block the generator continues as
    if it had drawn one number.
    """
    # CPU generators use 32 bits of a seed, so all 32 bits must depend on both numbers
    seed = (int(torch.randint(2**32, ())) + rank * 0x9E3779B1) % 2**32
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield
