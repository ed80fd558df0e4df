"""A linear layer of GELU's results, which are computed again in the backward pass.

They would be a quarter of what a block keeps for it, and computing them takes a hundredth of a step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.model.linear import Linear, product
from bloomlm.model.partition import WHOLE


def linear_of_gelu(layer: Linear, x: Tensor) -> Tensor:
    """layer(GELU(x)) with GELU's tanh form, [N, in] -> [N, out]; where the weight learns, x alone is kept."""
    keeps_x = (
        torch.is_grad_enabled()
        and layer.weight.requires_grad
        and not layer.update_matrices
        and layer.partition is WHOLE
        and x.dim() == 2
        and type(layer.weight) is nn.Parameter
        and not torch.compiler.is_compiling()
    )
    if not keeps_x:
        return layer(F.gelu(x, approximate="tanh"))
    out: Tensor = _LinearOfGelu.apply(x, layer.weight, layer.bias)
    return out


class _LinearOfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        return product(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        activated = F.gelu(x, approximate="tanh")
        grad_weight = product(grad.t(), activated.t())
        del activated  # its memory serves the next product
        grad_x = torch.ops.aten.gelu_backward(product(grad, weight.t()), x, approximate="tanh")
        return grad_x, grad_weight, grad.sum(0, dtype=ctx.bias_dtype)
