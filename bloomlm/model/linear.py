"""Matrix products with a weight. On x86 processors they go to oneDNN, in fp32 instead of torch's default, MKL.

Both compute the same sums. MKL reads a weight at a fraction of the memory's speed in products with few rows
(decoding), and uses AVX2 on every AMD processor, even one with AVX-512. oneDNN does neither; docs/decisions/onednn.md
has the measurements. It is used in bf16 too, where it has instructions for that. The operator is the one that
torch.compile emits; it takes plain tensors of any strides, so nothing is packed or copied. Where it does not exist or
does not apply, F.linear is called.

Without gradients, products go to our own operator instead, where this process has loaded it: few rows (a decoding step)
read a weight once, at the memory's speed, and many rows add bias and GELU while results are in the processor's cache.
Quantised weights keep to the library, because the operator would round their inputs to 16 bits.

Shapes: N rows.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.kernels.compiled import operators
from bloomlm.model.partition import WHOLE, Partition
from bloomlm.model.quantized import dequantize_rows, row_blocks, weights_per_element

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

_COLUMNS = 16
"""Rows of a weight must be a multiple of so many columns, or our operator would compute one number at a time."""
_OPERATOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The format of matrix products under autocast; None outside of it."""
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    return torch.get_autocast_dtype(device_type)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x W^T + b, differentiable.

    Under autocast x is rounded to its format, and the result has it. A weight in another format than x is rounded for
    each product, in the forward and in the backward pass, so that no rounded copy of it is kept between them.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].
        scale: of the rows where weight is quantised (see quantized.py); such a weight gets no gradient.

    Returns:
        [..., out].
    """
    if scale is not None:
        return _quantized_linear(x, weight, scale, bias)
    if _takes_operator(x, weight):
        return _by_operator(x, weight, bias)
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    x = x.to(autocast_dtype(x.device.type) or x.dtype)
    if x.dtype is weight.dtype and not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    if x.dim() != 2:
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


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


def _takes_operator(x: Tensor, weight: Tensor) -> bool:
    # is_compiling comes first: a graph that has looked at the number of rows would be compiled again for other numbers
    return (
        not torch.compiler.is_compiling()
        and operators() is not None
        and x.dim() == 2
        and not torch.is_grad_enabled()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.dtype in _OPERATOR_DTYPES
        # it would round an fp32 input to a weight's bf16
        and (weight.dtype is x.dtype or (x.dtype is torch.float32 and weight.dtype is torch.float16))
        and weight.shape[1] % _COLUMNS == 0
        and x.numel() > 0
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def _by_operator(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
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
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
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


_PLAIN = (Tensor, nn.Parameter)  # subclasses (DTensor, fake tensors) implement products themselves


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # a frozen weight does not keep x alive
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else product(grad, weight.t()),
            None if x is None else product(grad.t(), x.t()),
            grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
        )


def quantized_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b outside autograd, in x's dtype: [N, in], codes and scales of [out, in] -> [N, out]."""
    blocks = list(row_blocks(weight))
    if len(blocks) == 1:
        return linear(x, dequantize_rows(weight, scale, x.dtype), bias)
    out = x.new_empty(len(x), len(weight))
    for rows in blocks:
        part = dequantize_rows(weight[rows], scale[rows], x.dtype)
        out[:, rows] = linear(x, part, None if bias is None else bias[rows])
    return out


def quantized_input_gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """G W outside autograd: [N, out], codes and scales of [out, in] -> [N, in], added up in fp32 at least."""
    total: Tensor | None = None
    dtype = torch.promote_types(grad.dtype, torch.float32)
    for rows in row_blocks(weight):
        part = dequantize_rows(weight[rows], scale[rows], grad.dtype)
        product_of_rows = linear(grad[:, rows], part.t()).to(dtype)
        total = product_of_rows if total is None else total.add_(product_of_rows)
    assert total is not None
    return total


def _quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() != 2:
        return _quantized_linear(x.reshape(-1, x.shape[-1]), weight, scale, bias).view(*x.shape[:-1], -1)
    x = x.to(autocast_dtype(x.device.type) or x.dtype)
    out: Tensor = _QuantizedLinear.apply(x, weight, scale, None if bias is None else bias.to(x.dtype))
    return out


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # the backward pass converts the codes again, which the model keeps in memory anyway
        ctx.save_for_backward(weight, scale)
        return quantized_product(x, weight, scale, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        return quantized_input_gradient(grad, weight, scale).to(grad.dtype), None, None, grad_bias


class Linear(nn.Linear):
    """nn.Linear with `linear` as its product. in_features and out_features are those of the whole layer."""

    partition: Partition = WHOLE
    weight_scale: Tensor | None
    """Scales where the weight is quantised (see quantized.py); None where it is floating point."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("weight_scale", None, persistent=False)

    @property
    def update_matrices(self) -> tuple[Tensor, ...]:
        """Matrices of a low-rank update beside the weight, in the order of their products; () without an update."""
        return ()

    @property
    def num_weights(self) -> int:
        """Number of elements of the part of the weight that is held here."""
        return self.weight.numel() * weights_per_element(self.weight)

    @property
    def num_weight_products(self) -> int:
        """Number of products with the weight in a forward pass of training."""
        return 1

    @property
    def pass_flops(self) -> int:
        """Operations of an update in a forward pass, without gradient, whose number does not depend on the tokens."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        partition = self.partition
        if partition.sums_inputs:
            return self.without_bias(x) + self.bias
        return partition.leave(partition.multiply(x, self.weight, self.bias, self.weight_scale, linear))

    def without_bias(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]: the weight's product alone."""
        return self.partition.leave(self.partition.multiply(x, self.weight, None, self.weight_scale, linear))

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh form) of the layer's result, in one pass where possible."""
        x = x.to(autocast_dtype(x.device.type) or x.dtype)
        if not self.update_matrices and not self.partition.sums_inputs and x.dim() == 2:
            if _takes_operator(x, self.weight):
                return _by_operator(self.partition.enter(x), self.weight, self.bias, gelu=True)
            if not torch.is_grad_enabled() and uses_onednn(x, self.weight):
                return product(self.partition.enter(x), self.weight, self.bias, gelu=True)
        return F.gelu(self(x), approximate="tanh")
