"""Inputs of products that the backward pass makes again instead of keeping them: results of layer norms and of GELU.

A product with a weight that learns keeps its input for the weight's gradient. These inputs would be a third of what a
block keeps, what they are made of is kept anyway, and making them again takes a hundredth of a step. So a result
carries its recipe, and `linear` keeps that. A tensor derived from a result carries none, and is kept.

Shapes: N rows, D columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.kernels.compiled import GeluOperators, operators

_OPERATOR_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Recipe:
    """How a tensor was made."""

    make: Callable[..., Tensor]
    """From the ingredients to the tensor, the same bits each time."""
    ingredients: tuple[Tensor, ...]
    """Detached tensors."""


def remade(make: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
    """make(*ingredients), which carries its recipe where the ingredients are kept for its gradient anyway."""
    result = make(*ingredients)
    if result.requires_grad and not torch.compiler.is_compiling():
        result.recipe = Recipe(make, tuple(tensor.detach() for tensor in ingredients))  # type: ignore[attr-defined]
    return result


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe that a tensor carries."""
    return getattr(tensor, "recipe", None)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, with a recipe."""
    return remade(_gelu, x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm of [N, D], whose results carry their recipe."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return remade(self._normed, x, self.weight, self.bias)

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def _gelu(x: Tensor) -> Tensor:
    loaded = operators()
    if (
        torch.compiler.is_compiling()
        or loaded is None
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or x.dtype not in _OPERATOR_DTYPES
        or not x.is_contiguous()
    ):
        return F.gelu(x, approximate="tanh")
    out: Tensor = _Gelu.apply(x, loaded.gelu)
    return out


class _Gelu(torch.autograd.Function):
    """GELU by our operator (kernels/gelu.cpp)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: GeluOperators) -> Tensor:
        ctx.save_for_backward(x)
        ctx.operator, out = operator, torch.empty_like(x)
        operator.forward(x, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        ctx.operator.gradient(grad.contiguous(), x, out)
        return out, None
