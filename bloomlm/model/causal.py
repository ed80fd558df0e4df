"""Causal attention of whole documents on a CPU, with its gradient, by our operator (kernels/causal.cpp).

It takes queries, keys and values as the linear layer wrote them and documents of any lengths without pads, and computes
ALiBi from slopes. PyTorch's kernel, which attention.py calls elsewhere, needs position columns beside each head and
documents of one length, and reaches a third of this one's speed with AVX-512.

Shapes: N packed tokens, D documents, H heads, K head_dim, P virtual tokens.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bloomlm.kernels.compiled import CausalOperators, operators

_DTYPES = (torch.float32, torch.bfloat16)


def takes_causal(fused: Tensor, dropout: float = 0.0) -> bool:
    """Whether `causal_attention` may be called: plain tensors on a CPU, no dropout of weights, operators loaded."""
    loaded = operators()
    return (
        not torch.compiler.is_compiling()
        and loaded is not None
        and loaded.causal is not None
        and type(fused) is Tensor
        and fused.device.type == "cpu"
        and fused.dtype in _DTYPES
        and not dropout
    )


def causal_attention(
    fused: Tensor, lengths: tuple[int, ...], slopes: Tensor, virtual: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Causal attention within each document.

    Sums and softmax are in fp32, products in the dtype of fused where the processor has them.

    Args:
        fused: [N, H, 3, K] queries, keys and values in fp32 or bf16, with any strides but that of the last dimension.
        lengths: number of tokens of each document, at least 1; they add up to N.
        slopes: [H] ALiBi's slopes, fp32.
        virtual: keys and values [H, P, K] that stand before every document.

    Returns:
        [N, H * K] in the dtype of fused.
    """
    heads, head_dim = fused.shape[1], fused.shape[3]
    virtuals = slopes.new_empty(2, heads, 0, head_dim) if virtual is None else torch.stack(virtual).float()
    starts = torch.tensor([0, *accumulate(lengths)])
    out: Tensor = _Causal.apply(fused, virtuals, slopes, starts)
    return out


def _causal_operators() -> CausalOperators:
    loaded = operators()
    assert loaded is not None and loaded.causal is not None
    return loaded.causal


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, virtuals: Tensor, slopes: Tensor, starts: Tensor) -> Tensor:
        out = fused.new_empty(len(fused), fused.shape[1] * fused.shape[3])
        log_sums = slopes.new_empty(len(slopes), len(fused))
        _causal_operators().forward(fused, virtuals, slopes, starts, out, log_sums)
        ctx.save_for_backward(fused, virtuals, slopes, starts, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        fused, virtuals, slopes, starts, out, log_sums = ctx.saved_tensors
        grad_fused = torch.empty(fused.shape, dtype=fused.dtype)
        grad_virtuals = virtuals.new_empty(len(starts) - 1, *virtuals.shape)
        _causal_operators().gradient(
            grad_out.contiguous(), fused, virtuals, slopes, starts, out, log_sums, grad_fused, grad_virtuals
        )
        return grad_fused, grad_virtuals.sum(0), None, None
