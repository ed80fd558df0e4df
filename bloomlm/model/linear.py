"""Linear layers and their products, differentiable.

Weights that learn and inputs that products keep for them are not copied: a weight in another format is rounded for each
product, and what layer norms and GELU have made is made again in the backward pass (remade.py). Quantised weights keep
to the library (products.py), because our operator would round their inputs to 16 bits.

Shapes: N rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.model.partition import WHOLE, Partition
from bloomlm.model.products import PLAIN, by_operator, product, takes_operator, uses_onednn, weight_gradient
from bloomlm.model.quantized import dequantize_rows, row_blocks, weights_per_element
from bloomlm.model.remade import recipe_of


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
    if takes_operator(x, weight):
        return by_operator(x, weight, bias)
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    recipe = recipe_of(x) if weight.requires_grad and type(weight) in PLAIN and x.dim() == 2 else None
    x = x.to(autocast_dtype(x.device.type) or x.dtype)
    if x.dtype is weight.dtype and not uses_onednn(x, weight) and recipe is None:
        return F.linear(x, weight, bias)
    if x.dim() != 2:
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    make, ingredients = (None, ()) if recipe is None else (recipe.make, recipe.ingredients)
    out: Tensor = _Linear.apply(x, weight, bias, make, *ingredients)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        make: Callable[..., Tensor] | None,
        *ingredients: Tensor,
    ) -> Tensor:
        # a frozen weight does not keep x alive, nor does one whose x can be made again
        keeps_x = ctx.needs_input_grad[1] and make is None
        kept = x if keeps_x else None, weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(*kept, *ingredients)
        ctx.make = make
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *ingredients = ctx.saved_tensors
        if ctx.make is not None:
            x = ctx.make(*ingredients).to(grad.dtype)
        grad_weight = None if x is None else weight_gradient(grad, x)
        del x  # its memory serves the next product
        grad_x = None if weight is None else product(grad, weight.t())
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, *[None] * len(ingredients)


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
        """GELU (tanh form) of the layer's result, in one pass where possible and no hook wants to see that."""
        x = x.to(autocast_dtype(x.device.type) or x.dtype)
        has_hooks = self._forward_hooks or self._forward_pre_hooks
        if not has_hooks and not self.update_matrices and not self.partition.sums_inputs and x.dim() == 2:
            if takes_operator(x, self.weight):
                return by_operator(self.partition.enter(x), self.weight, self.bias, gelu=True)
            if not torch.is_grad_enabled() and uses_onednn(x, self.weight):
                return product(self.partition.enter(x), self.weight, self.bias, gelu=True)
        return F.gelu(self(x), approximate="tanh")
