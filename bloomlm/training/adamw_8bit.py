"""AdamW with 8-bit moments, by the kernels of bitsandbytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bloomlm.model.quantized import bitsandbytes_functional

BLOCK_VALUES = 256
"""Values that share a scale; the kernels of bitsandbytes support no other number."""
MIN_VALUES = 4096
"""Smaller parameters (biases, norms) keep fp32 moments, as in bitsandbytes, which take little memory."""
PIECE_VALUES = 2**20
"""Values that are updated at once. The embedding of a large model is too large for the kernels, which
make five fp32 copies of their input on a CPU, and count in 32 bits on a GPU. A piece consists of whole blocks, so the
results are the same."""

SCALES = ("exp_avg_scales", "exp_avg_sq_scales")


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments of one byte per value instead of four, rounded and updated by the kernels of bitsandbytes.

    A block of values shares a scale, and a byte selects one of 256 unevenly spaced values between -1 and 1 (0 and 1 for
    squares). Source: Dettmers et al., 8-bit optimizers via block-wise quantization, https://arxiv.org/abs/2110.02861.

    The state of a parameter consists of tensors that exist from the start: "step"; and "exp_avg" and "exp_avg_sq" in
    fp32, or for a large parameter "exp_avg_codes" and "exp_avg_sq_codes" (uint8, its shape) with "exp_avg_scales" and
    "exp_avg_sq_scales" (fp32, one for each block).

    Args:
        groups: groups of fp32 parameters on one device, each with its weight_decay.
        betas: decays of the two means.
        epsilon: added to the denominator.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], betas: tuple[float, float], epsilon: float) -> None:
        functional = bitsandbytes_functional()
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
                if parameter.grad is not None:
                    self.update_rows(group, parameter, slice(None), parameter.grad)
                    self.state[parameter]["step"] += 1

    @torch.no_grad()
    def update_rows(
        self,
        group: Mapping[str, Any],
        parameter: nn.Parameter,
        rows: slice,
        gradient: Tensor,
        blocked: Tensor | None = None,
    ) -> None:
        """As RowwiseAdamW.update_rows; the slice must start at a whole block of values."""
        if blocked is not None and bool(blocked):
            return
        state = self.state[parameter]
        if "exp_avg" in state:
            self._update_small(parameter, rows, gradient, state, group)
        else:
            self._update_large(parameter, rows, gradient, state, group)

    def _update_small(
        self,
        parameter: nn.Parameter,
        rows: slice,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:
        self._kernels.optimizer_update_32bit(
            "adam",
            gradient,
            parameter[rows],
            state["exp_avg"][rows],
            beta1=group["betas"][0],
            eps=group["eps"],
            step=int(state["step"]) + 1,
            lr=group["lr"],
            state2=state["exp_avg_sq"][rows],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
        )

    def _update_large(
        self,
        parameter: nn.Parameter,
        rows: slice,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:
        chosen = (tensor[rows].view(-1) for tensor in (parameter, state["exp_avg_codes"], state["exp_avg_sq_codes"]))
        by_value = [gradient.reshape(-1), *chosen]
        blocks = slice((rows.start or 0) * parameter[0].numel() // BLOCK_VALUES, None)
        by_block = [state[name][blocks][: -(-gradient.numel() // BLOCK_VALUES)] for name in SCALES]
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
                beta3=0.0,  # beta3 and alpha belong to other optimizers
                alpha=0.0,
                eps=group["eps"],
                step=int(state["step"]) + 1,
                lr=group["lr"],
                qmap1=self._maps[0],
                qmap2=self._maps[1],
                absmax1=scales,
                absmax2=sq_scales,
                weight_decay=group["weight_decay"],
            )


def _initial_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    # always on the CPU, because the kernels take the count as a Python number
    state = {"step": torch.zeros((), dtype=torch.float32)}
    for moment in ("exp_avg", "exp_avg_sq"):
        if parameter.numel() < MIN_VALUES:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        else:
            num_blocks = -(-parameter.numel() // BLOCK_VALUES)
            state[f"{moment}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{moment}_scales"] = torch.zeros(num_blocks, dtype=torch.float32, device=parameter.device)
    return state
