"""AdamW whose moments take one byte per value instead of four, rounded and updated by the kernels of bitsandbytes.

A block of 256 values shares a scale, and a byte picks one of 256 unevenly spaced values between -1 and 1 (0 and 1 for
the squares). Source: Dettmers et al., 8-bit optimizers via block-wise quantization, https://arxiv.org/abs/2110.02861.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_VALUES = 256
"""Values that share a scale; the kernels of bitsandbytes support no other number."""
MIN_VALUES = 4096
"""Moments of smaller parameters (biases, norms) stay in fp32, as in bitsandbytes: they take hardly any memory."""
PIECE_VALUES = 2**20
"""Values updated at once. On a CPU the kernel makes five fp32 copies of its input, on a GPU it counts in 32 bits; the
embedding of a large model is too large for either. A piece consists of whole blocks, so results are the same."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose whole state exists from the start as tensors, so that it is saved and read as any other.

    State of a parameter: "step"; "exp_avg" and "exp_avg_sq" in fp32, or for a large one "exp_avg_codes" and
    "exp_avg_sq_codes" (uint8, of its shape) with "exp_avg_scales" and "exp_avg_sq_scales" (fp32, one a block).

    Args:
        groups: of fp32 parameters on one device, each group with its weight_decay.
        betas: decays of the two means.
        epsilon: added to the denominator.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], betas: tuple[float, float], epsilon: float) -> None:
        from bitsandbytes import functional  # an extra

        super().__init__([dict(group) for group in groups], {"lr": 0.0, "betas": betas, "eps": epsilon})
        self._kernels = functional
        device = self.param_groups[0]["params"][0].device
        self._maps = tuple(functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False))
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _initial_state(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                if "exp_avg" in state:
                    self._update_small(parameter, state, group)
                else:
                    self._update_large(parameter, state, group)

    def _update_small(self, parameter: nn.Parameter, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        self._kernels.optimizer_update_32bit(
            "adam",
            parameter.grad,
            parameter,
            state["exp_avg"],
            beta1=group["betas"][0],
            eps=group["eps"],
            step=int(state["step"]),
            lr=group["lr"],
            state2=state["exp_avg_sq"],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
        )

    def _update_large(self, parameter: nn.Parameter, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        by_value = [parameter.grad.reshape(-1)]
        by_value += [tensor.view(-1) for tensor in (parameter, state["exp_avg_codes"], state["exp_avg_sq_codes"])]
        by_block = [state["exp_avg_scales"], state["exp_avg_sq_scales"]]
        pieces = zip(
            *(tensor.split(PIECE_VALUES) for tensor in by_value),
            *(tensor.split(PIECE_VALUES // BLOCK_VALUES) for tensor in by_block),
            strict=True,
        )
        for gradient, values, codes, sq_codes, scales, sq_scales in pieces:
            self._kernels.optimizer_update_8bit_blockwise(
                "adam",
                gradient,
                values,
                codes,
                sq_codes,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                beta3=0.0,  # like alpha, only for other optimizers
                alpha=0.0,
                eps=group["eps"],
                step=int(state["step"]),
                lr=group["lr"],
                qmap1=self._maps[0],
                qmap2=self._maps[1],
                absmax1=scales,
                absmax2=sq_scales,
                weight_decay=group["weight_decay"],
            )


def _initial_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    # on the CPU, wherever the parameter is: the kernels take the count as a Python number
    state = {"step": torch.zeros((), dtype=torch.float32)}
    for moment in ("exp_avg", "exp_avg_sq"):
        if parameter.numel() < MIN_VALUES:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        else:
            num_blocks = -(-parameter.numel() // BLOCK_VALUES)
            state[f"{moment}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{moment}_scales"] = torch.zeros(num_blocks, dtype=torch.float32, device=parameter.device)
    return state
