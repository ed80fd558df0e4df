"""In which number format a run computes, and what keeps half precision honest.

O1: fp32 weights, autocast runs the matrix products in half. O2: weights in half, the optimizer works on fp32 master
weights. fp16 adds a dynamic loss scale, so that small gradients do not vanish. This module knows nothing of steps.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bloomlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number formats of a run; the default is fp32 throughout."""

    compute_dtype: torch.dtype = torch.float32
    """Format of the matrix products: float32, bfloat16 or float16."""
    half_weights: bool = False
    """O2: the model's own weights are in compute_dtype too."""
    initial_loss_scale: float = 32768.0
    """Where fp16's dynamic loss scale starts."""

    def __post_init__(self) -> None:
        if self.initial_loss_scale < 1:
            raise ConfigError(f"scale_loss is {self.initial_loss_scale}; expected at least 1")

    @property
    def weights_dtype(self) -> torch.dtype:
        """The format to load the model in."""
        return self.compute_dtype if self.half_weights else torch.float32

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled: fp16 only."""
        return self.compute_dtype is torch.float16

    def autocast(self, device_type: str) -> AbstractContextManager[None]:
        """The context of every forward pass."""
        if self.half_weights or self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.compute_dtype)


def precision_from_flags(*, fp16: bool, bf16: bool, fp16_opt_level: str, scale_loss: float) -> Precision:
    """The precision that the flags ask for.

    Args:
        fp16: compute in float16.
        bf16: compute in bfloat16.
        fp16_opt_level: "O1" (fp32 weights) or "O2" (weights in half); acts on bf16 too.
        scale_loss: where fp16's loss scale starts.

    Raises:
        ConfigError: both formats, or an unknown level.
    """
    if fp16 and bf16:
        raise ConfigError("fp16 and bf16 were both asked for; choose one")
    if fp16_opt_level not in ("O1", "O2"):
        raise ConfigError(f"fp16_opt_level is {fp16_opt_level!r}; expected O1 or O2")
    if not (fp16 or bf16):
        return Precision()
    return Precision(
        compute_dtype=torch.float16 if fp16 else torch.bfloat16,
        half_weights=fp16_opt_level == "O2",
        initial_loss_scale=scale_loss,
    )


class LossScale:
    """fp16's dynamic loss scale: halved after an overflow, doubled after growth_interval good steps in a row.

    Source: Micikevicius et al., Mixed precision training, https://arxiv.org/abs/1710.03740, section 3.2.
    """

    def __init__(self, value: float, growth_interval: int = 2000) -> None:
        self.value = value
        self.growth_interval = growth_interval
        self.good_steps = 0

    @property
    def at_minimum(self) -> bool:
        """Whether another overflow can no longer be blamed on the scale."""
        return self.value <= 1.0

    def update(self, *, overflow: bool) -> None:
        """Take note of a step's outcome."""
        if overflow:
            self.value = max(1.0, self.value / 2)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= 2
            self.good_steps = 0


class LearnedParameters:
    """What the optimizer updates: the model's trainable parameters, or fp32 masters of those in half precision.

    A master collects its parameter's gradient in fp32 as soon as autograd has it, so gradients of many microbatches
    add up in fp32 and half-precision gradients never all live at once.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Args: named_parameters: as of model.named_parameters(); those that do not require a gradient are left out."""
        self.optimized: dict[str, nn.Parameter] = {}
        self.masters: list[tuple[nn.Parameter, nn.Parameter]] = []
        """(parameter of the model, its fp32 master)."""
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            if parameter.dtype not in (torch.float16, torch.bfloat16):
                self.optimized[name] = parameter
                continue
            master = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            parameter.register_post_accumulate_grad_hook(_gradient_mover(master))
            self.optimized[name] = master
            self.masters.append((parameter, master))

    def gradients(self) -> list[Tensor]:
        """The gradients that exist."""
        return [p.grad for p in self.optimized.values() if p.grad is not None]

    def named_gradients(self) -> dict[str, Tensor]:
        """The same by the name of their parameter."""
        return {name: p.grad for name, p in self.optimized.items() if p.grad is not None}

    def copy_to_model(self) -> None:
        """Round the masters into the model's parameters."""
        with torch.no_grad():
            for parameter, master in self.masters:
                parameter.copy_(master)


class _gradient_mover:
    """Hook that adds a half-precision gradient to its master's fp32 one and frees it."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self.master.grad is None:
            self.master.grad = parameter.grad.float()
        else:
            self.master.grad.add_(parameter.grad)
        parameter.grad = None
