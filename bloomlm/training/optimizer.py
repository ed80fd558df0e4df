"""AdamW with fp32 or 8-bit moments, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bloomlm.errors import ConfigError

BLOCK_VALUES = 256
"""8-bit moments: values that share a scale; the kernels of bitsandbytes support no other number."""
MIN_VALUES = 4096
"""8-bit moments: smaller parameters (biases, norms) keep fp32 moments, as in bitsandbytes, which take little memory."""
PIECE_VALUES = 2**20
"""8-bit moments: values that are updated at once. The embedding of a large model is too large for the kernels, which
make five fp32 copies of their input on a CPU, and count in 32 bits on a GPU. A piece consists of whole blocks, so the
results are the same."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW without its learning rate."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and layer norms are not decayed."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.999
    """Decay of the running mean of the squared gradient."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    optim: str = "adamw"
    """A name in OPTIMIZERS; decides the format of the moments."""


def is_decayed(name: str) -> bool:
    """Whether a parameter is decayed, as all are except biases and layer norms."""
    module_name, _, kind = name.rpartition(".")
    return kind != "bias" and not module_name.endswith(("layernorm", "ln_f"))


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW whose state exists from the start, so that a saved state can be read into it.

    `parameters` maps names to fp32 parameters (LearnedParameters.optimized). The learning rate is set at each step.
    """
    decayed = [p for name, p in parameters.items() if is_decayed(name)]
    others = [p for name, p in parameters.items() if not is_decayed(name)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.optim]([group for group in groups if group["params"]], config)


def _fused_adamw(groups: Sequence[Mapping[str, Any]], config: AdamWConfig) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        [dict(group) for group in groups], lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
    for parameter in (parameter for group in groups for parameter in group["params"]):
        # the state that AdamW creates at its first step
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


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
                beta3=0.0,  # beta3 and alpha belong to other optimizers
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


def _adamw_8bit(groups: Sequence[Mapping[str, Any]], config: AdamWConfig) -> AdamW8bit:
    return AdamW8bit(groups, (config.beta1, config.beta2), config.epsilon)


OPTIMIZERS: dict[str, Callable[[Sequence[Mapping[str, Any]], AdamWConfig], torch.optim.Optimizer]] = {
    "adamw": _fused_adamw,
    "adamw_8bit": _adamw_8bit,
}
"""optim -> AdamW with fp32 moments, or with 8-bit moments (extra optim8bit)."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of the optimizer by names ("optimizer/PARAMETER/exp_avg"), sharing its memory."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def linear_decay(progress: float, lr_decay_ratio: float) -> float:
    """A straight line from 1 at progress 0 to lr_decay_ratio at progress 1."""
    return 1.0 - (1.0 - lr_decay_ratio) * progress


def cosine_decay(progress: float, lr_decay_ratio: float) -> float:
    """Half a period of a cosine from 1 at progress 0 to lr_decay_ratio at progress 1."""
    return lr_decay_ratio + (1.0 - lr_decay_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def no_decay(progress: float, lr_decay_ratio: float) -> float:
    """1 at every progress."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": linear_decay,
    "cosine": cosine_decay,
    "constant": no_decay,
    "constant_with_warmup": no_decay,
}
"""lr_scheduler_type -> function of the progress after the warm-up (0 to 1) that gives a factor of the learning rate."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rates of a run whose length is not known yet.

    Raises:
        ConfigError: unknown type, or a number out of its range.
    """

    learning_rate: float
    """Peak."""
    lr_scheduler_type: str = "linear"
    """A name in SCHEDULES."""
    warmup_steps: int = 0
    """Length of the warm-up; above 0 it overrides warmup_ratio."""
    warmup_ratio: float = 0.0
    """Length of the warm-up as a fraction of the run."""
    lr_decay_ratio: float = 0.1
    """Final learning rate of linear and cosine, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if self.lr_scheduler_type not in SCHEDULES:
            expected = ", ".join(SCHEDULES)
            raise ConfigError(f"lr_scheduler_type is {self.lr_scheduler_type!r}; expected one of {expected}")
        if not 0.0 <= self.warmup_ratio <= 1.0 or self.warmup_steps < 0:
            raise ConfigError(
                f"warmup_ratio is {self.warmup_ratio} and warmup_steps is {self.warmup_steps}; expected 0 to 1, and at "
                "least 0"
            )
        if not 0.0 <= self.lr_decay_ratio <= 1.0:
            raise ConfigError(f"lr_decay_ratio is {self.lr_decay_ratio}; expected 0 to 1")
        if self.lr_scheduler_type == "constant" and (self.warmup_steps > 0 or self.warmup_ratio > 0):
            raise ConfigError(
                "lr_scheduler_type constant has no warm-up; use constant_with_warmup, or leave out warmup_steps and "
                "warmup_ratio"
            )

    def over(self, max_steps: int) -> "Schedule":
        """The schedule of a run of this many steps."""
        return Schedule(self, max_steps)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: a linear rise during the warm-up, then a decay until the end of the run.

    Step k (from 0) of T with w steps of warm-up has learning_rate * k / w for k < w (0 for the first step), and
    learning_rate * decay((k - w) / (T - w)) for later steps.
    """

    config: ScheduleConfig
    max_steps: int
    """Steps of the run (T)."""

    @property
    def warmup_steps(self) -> float:
        """Length of the warm-up (w), which need not be a whole number."""
        return self.config.warmup_steps or self.config.warmup_ratio * self.max_steps

    def __call__(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        config, warmup_steps = self.config, self.warmup_steps
        if step < warmup_steps:
            return config.learning_rate * step / max(1.0, warmup_steps)
        decay_steps = self.max_steps - warmup_steps
        progress = min(1.0, (step - warmup_steps) / decay_steps) if decay_steps > 0 else 1.0
        return config.learning_rate * SCHEDULES[config.lr_scheduler_type](progress, config.lr_decay_ratio)
