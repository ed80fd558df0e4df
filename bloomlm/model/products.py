"""Matrix products outside autograd. On x86 processors they go to oneDNN, in fp32 instead of torch's default, MKL.

Both compute the same sums. MKL reads a weight at a fraction of the memory's speed in products with few rows
(decoding), and uses AVX2 on every AMD processor, even one with AVX-512. oneDNN does neither; docs/decisions/onednn.md
has the measurements. It is used in bf16 too, where it has instructions for that. The operator is the one that
torch.compile emits; it takes weights of any strides, so they are not packed or copied. Where it does not exist or does
not apply, F.linear is called.

Without gradients, products go to our own operator instead, where this process has loaded it: few rows (a decoding step)
read a weight once, at the memory's speed, and many rows add bias and GELU while results are in the processor's cache.
Another computes the gradients of weights.

Shapes: N rows.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.kernels.compiled import operators

_ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    else None
)
_ONEDNN_DTYPES = (
    (torch.float32, torch.bfloat16)
    if _ONEDNN_LINEAR is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else (torch.float32,)
)

COLUMNS = 16
"""Rows of a weight must be a multiple of so many columns, or our operator would compute one number at a time."""
_OPERATOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors; subclasses (DTensor, fake tensors) implement products themselves."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x W^T + b outside autograd: [N, in], [out, in] -> [N, out] in x's dtype, to which weight and bias are rounded.

    x and weight may be transposed views. With gelu, GELU (tanh form) is applied, where oneDNN is used while the results
    are in the processor's cache.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not uses_onednn(x, weight):
        out = F.linear(x, weight, bias)
        return F.gelu(out, approximate="tanh") if gelu else out
    assert _ONEDNN_LINEAR is not None
    result: Tensor = _ONEDNN_LINEAR(x, weight, bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
    return result


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """G^T x outside autograd: [N, out], [N, in] -> [out, in] in x's dtype. The rows of grad may be further apart.

    Our operator reads gradients by columns; for oneDNN's, PyTorch turns them over first. In bf16 a plain product is a
    fifth faster than that of a linear layer, which is made for an x that is a weight.
    """
    if grad.dtype is not torch.float32:
        return grad.t() @ x
    loaded = operators()
    if loaded is None or loaded.weight_gradient is None or not uses_onednn(grad, x) or grad.stride(1) != 1:
        return product(grad.t(), x.t())
    out = x.new_empty(grad.shape[1], x.shape[1])
    loaded.weight_gradient(grad, x.contiguous(), out)
    return out


def takes_operator(x: Tensor, weight: Tensor) -> bool:
    """Whether our operator computes a product: without gradients, of plain tensors on a CPU."""
    # is_compiling comes first: a graph that has looked at the number of rows would be compiled again for other numbers
    return (
        not torch.compiler.is_compiling()
        and operators() is not None
        and x.dim() == 2
        and not torch.is_grad_enabled()
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype in _OPERATOR_DTYPES
        # it reads a weight in 16 bits as it is, and beside one in bf16 it may round an fp32 input to bf16
        and (weight.dtype is x.dtype or (x.dtype is torch.float32 and weight.dtype in _OPERATOR_DTYPES))
        and weight.shape[1] % COLUMNS == 0
        and x.numel() > 0
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def by_operator(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """`product` for [N, in] by our operator."""
    loaded = operators()
    assert loaded is not None
    if x.dtype is not torch.float16:
        return loaded.product(x.contiguous(), weight, bias, gelu)
    out = loaded.product(x.float().contiguous(), weight, None if bias is None else bias.float(), gelu)
    return out.to(x.dtype)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` calls oneDNN: plain tensors on a CPU in fp32 or bf16, no tracing, oneDNN enabled in torch."""
    return (
        _ONEDNN_LINEAR is not None
        and x.device.type == "cpu"
        and x.dtype is weight.dtype
        and x.dtype in _ONEDNN_DTYPES
        and x.numel() > 0
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
    )


ROWS_UNIT = 16
"""oneDNN's products may lose up to two fifths of their speed where the number of rows is no multiple of this.

It prefers blocks that divide the rows exactly, even blocks of 61 rows: for 671 rows of 1,024 columns it reached 590
GFLOP/s in bf16 and 330 in fp32, and 810 and 425 for 672.
"""
_LEAST_ROWS = 256


def takes_multiples(x: Tensor) -> bool:
    """Whether products of x [N, in] with many weights are faster with rows of zeros up to a multiple of ROWS_UNIT."""
    return len(x) >= _LEAST_ROWS and uses_onednn(x, x)
