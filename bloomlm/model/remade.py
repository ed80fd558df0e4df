"""Inputs of products that the backward pass makes again instead of keeping them: results of layer norms and of GELU.

A product with a weight that learns keeps its input for the weight's gradient. These inputs would be a third of what a
block keeps, what they are made of is kept anyway, and making them again takes a hundredth of a step. So a result
carries its recipe, and `linear` keeps that. A tensor derived from a result carries none, and is kept.

Shapes: N rows, D columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    return F.gelu(x, approximate="tanh")
