"""The number formats of a run, and what keeps training in half precision accurate.

O1 has fp32 weights, and autocast computes matrix products in half precision. O2 has weights in half precision, and the
optimizer updates fp32 master weights. fp16 adds a dynamic loss scale, so that small gradients do not become zero.
"""

import math
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
    """O2: whether the weights of the model are in compute_dtype too."""
    initial_loss_scale: float = 32768.0
    """Initial value of fp16's dynamic loss scale."""

    def __post_init__(self) -> None:
        if self.initial_loss_scale < 1:
            raise ConfigError(f"scale_loss is {self.initial_loss_scale}; expected at least 1")

    @property
    def weights_dtype(self) -> torch.dtype:
        """The format in which the model is loaded."""
        return self.compute_dtype if self.half_weights else torch.float32

    def linear_dtype(self, device_type: str, *, learns: bool) -> torch.dtype | None:
        """The format in which weights of linear layers are loaded, where it is not weights_dtype.

        On a CPU, weights that do not learn are rounded once, which gives the same products. Answers that are generated
        meanwhile read them as they are, by the operators for decoding; a GPU would convert them for each token.
        """
        return self.compute_dtype if device_type == "cpu" and not learns else None

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, which only fp16 needs."""
        return self.compute_dtype is torch.float16

    def autocast(self, device_type: str) -> AbstractContextManager[None]:
        """The context in which forward passes run."""
        if self.half_weights or self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.compute_dtype)


def precision_from_flags(*, fp16: bool, bf16: bool, fp16_opt_level: str, scale_loss: float) -> Precision:
    """The precision that the flags describe; fp16_opt_level acts with bf16 too.

    Raises:
        ConfigError: both formats are given, or the level is unknown.
    """
    if fp16 and bf16:
        raise ConfigError("fp16 and bf16 are both given; choose one")
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
    """The dynamic loss scale of fp16, halved after an overflow and doubled after growth_interval good steps in a row.

    Source: Micikevicius et al., Mixed precision training, https://arxiv.org/abs/1710.03740, section 3.2.
    """

    def __init__(self, value: float, growth_interval: int = 2000) -> None:
        self.value = value
        self.growth_interval = growth_interval
        self.good_steps = 0

    @property
    def at_minimum(self) -> bool:
        """Whether the scale cannot fall further, so that an overflow must have another cause."""
        return self.value <= 1.0

    def update(self, *, overflow: bool) -> None:
        """Adjust the scale after a step."""
        if overflow:
            self.value = max(1.0, self.value / 2)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= 2
            self.good_steps = 0


def reason_to_skip(loss: float, grad_norm: float) -> str | None:
    """Why a step must not update the weights, which is a value that is not finite; None if it may."""
    values = {"loss": loss, "gradient norm": grad_norm}
    return next((f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)


class LearnedParameters:
    """What the optimizer updates: the parameters that learn, or fp32 masters of those in half precision.

    Args:
        named_parameters: model.named_parameters(); parameters that do not require a gradient are left out.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.optimized: dict[str, nn.Parameter] = {}
        self.masters: dict[Tensor, nn.Parameter] = {}
        """Half-precision parameter of the model -> its fp32 master."""
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            if parameter.dtype not in (torch.float16, torch.bfloat16):
                self.optimized[name] = parameter
                continue
            master = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            self.optimized[name] = self.masters[parameter] = master

    def move_gradients(self) -> None:
        """From now on add each half-precision gradient to its master's as soon as autograd has computed it.

        So the gradients of microbatches add up in fp32, and the half-precision gradients never exist all at once.
        """
        for parameter, master in self.masters.items():
            parameter.register_post_accumulate_grad_hook(_gradient_mover(master))

    def gradients(self) -> list[Tensor]:
        """The existing gradients of optimized parameters."""
        return [p.grad for p in self.optimized.values() if p.grad is not None]

    def named_gradients(self) -> dict[str, Tensor]:
        """The existing gradients by the names of their parameters."""
        return {name: p.grad for name, p in self.optimized.items() if p.grad is not None}

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients by a factor, in place."""
        if factor != 1.0:
            for gradient in self.gradients():
                gradient.mul_(factor)

    def copy_to_model(self) -> None:
        """Round the masters into the model's parameters."""
        with torch.no_grad():
            for parameter, master in self.masters.items():
                parameter.copy_(master)


class _gradient_mover:
    """Hook that adds a half-precision gradient to the fp32 gradient of its master, and frees it."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # its gradient is not autograd's, or nothing depends on it
            return
        if self.master.grad is None:
            self.master.grad = parameter.grad.float()
        else:
            self.master.grad.add_(parameter.grad)
        parameter.grad = None
