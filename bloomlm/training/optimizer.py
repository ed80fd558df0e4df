"""AdamW and its groups of parameters, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bloomlm.errors import ConfigError
from bloomlm.training.adamw_8bit import AdamW8bit


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
    loraplus_lr_ratio: float = 1.0
    """LoRA+: learning rate of lora_B divided by that of lora_A."""


def is_decayed(name: str) -> bool:
    """Whether a parameter is decayed, as all are except biases and layer norms."""
    module_name, _, kind = name.rpartition(".")
    return kind != "bias" and not module_name.endswith(("layernorm", "ln_f"))


def rate_factor(name: str, parameter: Tensor, config: AdamWConfig) -> float:
    """The factor of the learning rate for a parameter: loraplus_lr_ratio for lora_B and for vectors, 1 for others.

    The vectors that learn beside LoRA's matrices are DoRA's magnitudes and biases. Source: Hayou et al., LoRA+,
    https://arxiv.org/abs/2402.12354; the groups are those of PEFT's create_loraplus_optimizer.
    """
    return config.loraplus_lr_ratio if name.endswith(".lora_B") or parameter.dim() == 1 else 1.0


class RowwiseAdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose state exists from the start, and which also updates some rows of a parameter."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], betas: tuple[float, float], epsilon: float) -> None:
        super().__init__([dict(group) for group in groups], lr=0.0, betas=betas, eps=epsilon, fused=True)
        for parameter in (parameter for group in groups for parameter in group["params"]):
            # the state that AdamW creates at its first step
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    @torch.no_grad()
    def update_rows(
        self,
        group: Mapping[str, Any],
        parameter: nn.Parameter,
        rows: slice,
        gradient: Tensor,
        blocked: Tensor | None = None,
    ) -> None:
        """Update rows of a parameter, but not its count of steps, which goes up when all rows have been updated.

        Args:
            group: the parameter's group.
            parameter: one of the group.
            rows: its first dimension; slice(None) is all of it.
            gradient: of these rows.
            blocked: scalar; 1.0 on its device turns the update off.
        """
        state = self.state[parameter]
        adamw(
            [parameter[rows]],
            [gradient],
            [state["exp_avg"][rows]],
            [state["exp_avg_sq"][rows]],
            [],
            [state["step"].clone()],
            fused=True,
            found_inf=blocked,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: AdamWConfig) -> RowwiseAdamW | AdamW8bit:
    """AdamW whose state exists from the start, so that a saved state can be read into it.

    `parameters` maps names to fp32 parameters (LearnedParameters.optimized). The learning rate is set at each step.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        weight_decay = config.weight_decay if is_decayed(name) else 0.0
        groups.setdefault((weight_decay, rate_factor(name, parameter, config)), []).append(parameter)
    return OPTIMIZERS[config.optim](
        [
            {"params": members, "weight_decay": weight_decay, "rate_factor": factor}
            for (weight_decay, factor), members in groups.items()
        ],
        (config.beta1, config.beta2),
        config.epsilon,
    )


OPTIMIZERS: dict[str, type[RowwiseAdamW] | type[AdamW8bit]] = {"adamw": RowwiseAdamW, "adamw_8bit": AdamW8bit}
"""optim -> AdamW with fp32 moments, or with 8-bit moments (extra optim8bit)."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of the optimizer by names ("optimizer/PARAMETER/exp_avg"), sharing its memory."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next update, which each group multiplies by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_factor"]


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
