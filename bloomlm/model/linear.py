"""Matrix products with a weight, in fp32 on x86 processors by oneDNN instead of torch's default, MKL.

Both compute the same sums in fp32. MKL reads a weight at a fraction of the memory's speed where it meets few rows
(decoding), and takes its AVX2 path on AMD processors whatever they have; oneDNN does neither
(docs/decisions/onednn.md has the measurements). The operator is the one that torch.compile emits; it takes plain
tensors as they lie, so nothing is packed or copied. Where it does not exist or does not apply, F.linear serves.

Shapes: N rows.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, differentiable.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out].
    """
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    if x.dim() != 2:
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b outside autograd, for tensors that uses_onednn: [N, in], [out, in] -> [N, out].

    Either may be a transposed view.
    """
    assert _ONEDNN_LINEAR is not None
    out: Tensor = _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return out


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes oneDNN: plain fp32 tensors on a CPU, not traced, oneDNN not switched off in torch."""
    return (
        _ONEDNN_LINEAR is not None
        and x.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and x.numel() > 0
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
    )


_PLAIN = (Tensor, nn.Parameter)  # subclasses (DTensor, fake tensors) bring products of their own


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # a frozen weight does not keep x alive
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else product(grad, weight.t()),
            None if x is None else product(grad.t(), x.t()),
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)
