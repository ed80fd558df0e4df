"""AdamW of fp32 masters in one pass, by our operator (kernels/adamw.cpp), for weights in bf16 on a CPU.

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


class MasterAdamW:
    """Updates masters whose state an optimizer has.

    Args:
        loaded: the operators.
        optimizer: over the masters.
        masters: weight of the model -> its master.
    """

    def __init__(self, loaded: Operators, optimizer: RowwiseAdamW, masters: Mapping[Tensor, nn.Parameter]) -> None:
        self._state, self._adamw, self._norm = optimizer.state, loaded.adamw, loaded.norm
        self._weights = {master: weight for weight, master in masters.items()}

    def norm(self, gradient: Tensor) -> Tensor:
        """The norm of a contiguous gradient in bf16 or fp32: a scalar in fp32, added up in fp64."""
        return torch.tensor(self._norm(gradient))

    @torch.no_grad()
    def update_rows(self, group: Mapping[str, Any], master: nn.Parameter, rows: slice, gradient: Tensor) -> None:
        """Update rows of a master and of its weight, but not the count of steps, as RowwiseAdamW.update_rows does.

        Args:
            group: the master's group of the optimizer.
            master: one of the group.
            rows: its first dimension; slice(None) is all of it.
            gradient: of these rows, contiguous, in bf16 or fp32.
        """
        state, (beta1, beta2), learning_rate = self._state[master], group["betas"], group["lr"]
        steps = float(state["step"]) + 1.0
        self._adamw(
            gradient,
            master[rows],
            state["exp_avg"][rows],
            state["exp_avg_sq"][rows],
            self._weights[master][rows],
            1.0 - learning_rate * group["weight_decay"],
            beta1,
            beta2,
            learning_rate / (1.0 - beta1**steps),
            (1.0 - beta2**steps) ** -0.5,
            group["eps"],
        )


def master_adamw(optimizer: RowwiseAdamW | AdamW8bit, masters: Mapping[Tensor, nn.Parameter]) -> MasterAdamW | None:
    """The updates of all that an optimizer updates, if they are masters that the operator takes."""
    loaded = operators()
    if loaded is None or not isinstance(optimizer, RowwiseAdamW):
        return None
    takes_all = (
        len(masters) == sum(len(group["params"]) for group in optimizer.param_groups) > 0
        and all(_is_taken(weight) and _is_taken(master) for weight, master in masters.items())
        and all(weight.dtype is torch.bfloat16 for weight in masters)
    )
    return MasterAdamW(loaded, optimizer, masters) if takes_all else None


def _is_taken(parameter: Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()
