"""LoRA: a frozen linear layer plus a trained low-rank update.

Source: Hu et al., https://arxiv.org/abs/2106.09685: y = x W^T + b + scaling * dropout(x) A^T B^T with
scaling = lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732).

Shapes: N tokens, R lora rank.
"""

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.errors import AdapterError, ConfigError
from bloomlm.model.linear import Linear

T = TypeVar("T", int, float)

BLOCK_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers get an update, and of what rank."""

    r: int = 4
    """Rank of the update."""
    lora_alpha: float | None = None
    """Numerator of the scaling; None: 2 * r."""
    lora_dropout: float = 0.0
    """Dropout probability on the update's input."""
    target_modules: tuple[str, ...] = ("query_key_value",)
    """Block linears that learn: any of BLOCK_LINEARS."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Module name or regular expression of its end -> another r."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Module name or regular expression of its end -> another lora_alpha."""
    replaced_names: tuple[str, ...] = ()
    """Parameters of the model itself that learn too and belong to the adapter: trained biases."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"LoRA's r is {self.r}; expected at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}; expected a number from 0 to below 1")
        unknown = [name for name in self.target_modules if name not in BLOCK_LINEARS]
        if unknown or not self.target_modules:
            raise ConfigError(
                f"LoRA target_modules {list(self.target_modules)}: expected any of {', '.join(BLOCK_LINEARS)}"
            )

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return 2.0 * self.r if self.lora_alpha is None else self.lora_alpha

    def rank_of(self, module_name: str) -> int:
        """The rank for a module, by rank_pattern or r."""
        return _match(self.rank_pattern, module_name, self.r)

    def scaling_of(self, module_name: str) -> float:
        """The scaling for a module."""
        lora_rank = self.rank_of(module_name)
        alpha = _match(self.alpha_pattern, module_name, self.alpha)
        return alpha / (math.sqrt(lora_rank) if self.use_rslora else lora_rank)


def _match(pattern_values: Mapping[str, T], module_name: str, default: T) -> T:
    """First pattern that equals the name's end at a dot, as PEFT reads rank_pattern and alpha_pattern."""
    for pattern, value in pattern_values.items():
        if re.match(rf"(.*\.)?({pattern})$", module_name):
            return value
    return default


class LoRALinear(Linear):
    """A linear layer whose weight and bias keep their names, with lora_A [R, in] and lora_B [out, R] beside them."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_B_learns: Tensor | None
    """[out, R] boolean: entries of lora_B that learn, where the others stay zero; None: all of them."""
    config: LoraConfig
    scaling: float

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: LoraConfig,
        module_name: str,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> "LoRALinear":
        """Wrap a layer, sharing its weight and bias; the update starts at zero.

        Args:
            linear: the layer; its parameters stop learning.
            config: rank, scaling, dropout.
            module_name: full name in the model, for the patterns.
            generator: randomness for lora_A.
            device: where lora_A and lora_B go; None: where the weight is.
        """
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        lora_rank = config.rank_of(module_name)
        device, dtype = device or linear.weight.device, linear.bias.dtype
        layer.lora_A = nn.Parameter(torch.empty(lora_rank, linear.in_features, dtype=dtype, device=device))
        layer.lora_B = nn.Parameter(torch.zeros(linear.out_features, lora_rank, dtype=dtype, device=device))
        layer.register_buffer("lora_B_learns", None, persistent=False)
        # kaiming_uniform with a = sqrt(5), as PEFT draws it: uniform within 1 / sqrt(in)
        bound = 1 / math.sqrt(linear.in_features)
        with torch.no_grad():
            layer.lora_A.uniform_(-bound, bound, generator=generator)
        if isinstance(linear, Linear):
            layer.exchange, layer.weight_scale = linear.exchange, linear.weight_scale
        layer.config = config
        layer.scaling = config.scaling_of(module_name)
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        with self.exchange.input_randomness() if self.training and self.config.lora_dropout else nullcontext():
            update = F.dropout(x, self.config.lora_dropout, self.training)
        low_rank = self.exchange.between(F.linear(update.to(self.lora_A.dtype), self.lora_A))
        base = super().forward(x)
        lora_b: Tensor = self.lora_B
        if self.lora_B_learns is not None:
            lora_b = torch.where(self.lora_B_learns, lora_b, 0.0)  # no gradient for the others
        if torch.is_autocast_enabled(x.device.type) or base.dtype != low_rank.dtype:
            return base + (F.linear(low_rank, lora_b) * self.scaling).to(base.dtype)
        # one kernel multiplies, scales and adds in place: nothing needs base's old value again
        return base.addmm_(low_rank, lora_b.t(), alpha=self.scaling)

    def delta(self) -> Tensor:
        """[out, in] fp32: what the update adds to the weight."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    def merge(self) -> nn.Linear:
        """The inverse of from_linear: a plain layer with the update added in fp32 and rounded once.

        Raises:
            AdapterError: the weight is int8, whose steps are larger than most updates.
        """
        if self.weight_scale is not None:
            raise AdapterError("an int8 weight cannot take LoRA's update; load the model without int8 and merge there")
        with torch.device("meta"):
            linear = Linear(self.in_features, self.out_features)
        with torch.no_grad():
            self.weight.copy_(self.weight.float() + self.delta())
        linear.weight, linear.bias, linear.exchange = self.weight, self.bias, self.exchange
        return linear.train(self.training)
