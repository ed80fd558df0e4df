"""AdamW in one pass by our operator (kernels/adamw.cpp), for gradients in bf16 on a CPU.

It updates fp32 weights, or the fp32 masters of weights in bf16.

PyTorch's fused AdamW takes parameters and gradients of one format, so every gradient would be copied in fp32, and every
master read again to be rounded into its weight, which takes as long again as the update.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bloomlm.kernels.compiled import Operators, operators
from bloomlm.training.adamw_8bit import AdamW8bit
from bloomlm.training.optimizer import RowwiseAdamW


class OnePassAdamW:
    """Updates parameters whose state an optimizer has.

    Args:
        loaded: the operators.
        optimizer: over all parameters.
        masters: weight of the model -> its master; empty where the weights themselves are optimized.
    """

    def __init__(self, loaded: Operators, optimizer: RowwiseAdamW, masters: Mapping[Tensor, nn.Parameter]) -> None:
        self._state, self._adamw, self._norm = optimizer.state, loaded.adamw, loaded.norm
        self._weights = {master: weight for weight, master in masters.items()}

    def norm(self, gradient: Tensor) -> Tensor:
        """The norm of a contiguous gradient in bf16 or fp32: a scalar in fp32, added up in fp64."""
        return torch.tensor(self._norm(gradient))

    @torch.no_grad()
    def update_rows(self, group: Mapping[str, Any], parameter: nn.Parameter, rows: slice, gradient: Tensor) -> None:
        """Update rows of a parameter, and of the weight whose master it is.

        The count of steps stays, as in RowwiseAdamW.update_rows.

        Args:
            group: the parameter's group of the optimizer.
            parameter: one of the group.
            rows: its first dimension; slice(None) is all of it.
            gradient: of these rows, contiguous, in bf16 or fp32.
        """
        state, (beta1, beta2), learning_rate = self._state[parameter], group["betas"], group["lr"]
        steps, weight = float(state["step"]) + 1.0, self._weights.get(parameter)
        self._adamw(
            gradient,
            parameter[rows],
            state["exp_avg"][rows],
            state["exp_avg_sq"][rows],
            None if weight is None else weight[rows],
            1.0 - learning_rate * group["weight_decay"],
            beta1,
            beta2,
            learning_rate / (1.0 - beta1**steps),
            (1.0 - beta2**steps) ** -0.5,
            group["eps"],
        )


def one_pass_adamw(
    optimizer: RowwiseAdamW | AdamW8bit, masters: Mapping[Tensor, nn.Parameter], compute_dtype: torch.dtype
) -> OnePassAdamW | None:
    """The updates of all that an optimizer updates, if products are in bf16 and the operator takes all parameters."""
    loaded = operators()
    if loaded is None or not isinstance(optimizer, RowwiseAdamW) or compute_dtype is not torch.bfloat16:
        return None
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    takes_all = (
        len(masters) in (0, len(optimized))
        and all(_is_taken(parameter) for parameter in (*optimized, *masters))
        and all(weight.dtype is torch.bfloat16 for weight in masters)
    )
    return OnePassAdamW(loaded, optimizer, masters) if takes_all else None


def _is_taken(parameter: Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()
