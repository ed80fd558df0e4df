"""A frozen linear layer with a trained low-rank update beside it.

Source: Hu et al., https://arxiv.org/abs/2106.09685: y = x W^T + b + scaling * dropout(x) A^T B^T.

Shapes: N tokens, R lora rank.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.adapters.base import AdapterModule
from bloomlm.errors import AdapterError
from bloomlm.model.linear import Linear, linear
from bloomlm.model.partition import Partition
from bloomlm.model.quantized import dequantize_rows, row_blocks

if TYPE_CHECKING:
    from bloomlm.adapters.lora import LoraConfig


def low_rank_product(x: Tensor, lora_a: Tensor, partition: Partition) -> Tensor:
    """[N, in] and [R, in] -> [N, R], whole on every rank."""
    return partition.between(linear(x.to(lora_a.dtype), lora_a))


def add_update(base: Tensor, low_rank: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """base + scaling * low_rank B^T, in place of base [N, out]; low_rank is [N, R] and lora_b [out, R]."""
    if torch.is_autocast_enabled(base.device.type) or base.dtype != low_rank.dtype:
        return base.add_((linear(low_rank, lora_b) * scaling).to(base.dtype))
    # one kernel multiplies, scales and adds; nothing needs the old value of base again
    return base.addmm_(low_rank, lora_b.t(), alpha=scaling)


class LoRALinear(Linear, AdapterModule):
    """A linear layer whose weight and bias keep their names, with lora_A [R, in] and lora_B [out, R] beside them."""

    own_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    """Names of the parameters that the base model's layer does not have."""
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_B_learns: Tensor | None
    """[out, R] bool, True where an entry of lora_B learns; the others stay zero. None: all entries learn."""
    config: "LoraConfig"
    scaling: float

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: "LoraConfig",
        module_name: str,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> "LoRALinear":
        """Wrap a layer, sharing its weight and bias; the update starts at zero.

        Args:
            linear: the layer; its parameters stop learning.
            config: rank, scaling, dropout.
            module_name: full name in the model, for the patterns of the configuration.
            generator: randomness for lora_A.
            device: where the new parameters go; None: where the weight is.
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
            layer.partition, layer.weight_scale = linear.partition, linear.weight_scale
        layer.config = config
        layer.scaling = config.scaling_of(module_name)
        layer.train(linear.training)
        return layer

    @property
    def update_matrices(self) -> tuple[Tensor, ...]:
        """lora_A and lora_B."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        low_rank = self.low_rank(self.dropped(x))
        return add_update(super().forward(x), low_rank, self.learning_b(), self.scaling)

    def row_scale(self) -> Tensor | None:
        """[out] the factor of each row of the updated weight in fp32; None: every factor is 1."""
        return None

    def dropped(self, x: Tensor) -> Tensor:
        """x after dropout in training."""
        if not (self.training and self.config.lora_dropout):
            return x
        with self.partition.input_randomness():
            return F.dropout(x, self.config.lora_dropout)

    def low_rank(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, R]."""
        return low_rank_product(x, self.lora_A, self.partition)

    def learning_b(self) -> Tensor:
        """[out, R] lora_B, in which entries that do not learn get no gradient."""
        return self.lora_B if self.lora_B_learns is None else torch.where(self.lora_B_learns, self.lora_B, 0.0)

    def merged_weight(self, whole: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """[out, in] the weight with the update added, computed in fp32 some rows at a time and rounded once.

        Args:
            whole: gathers the shards of a tensor.
            dtype: precision of the result.

        Raises:
            AdapterError: the weight is quantised, in steps that are larger than most updates.
        """
        if self.weight_scale is not None:
            raise AdapterError(
                "a quantised weight cannot take an update; load the model without quantisation and merge there"
            )
        weight = whole(self.weight)
        merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows, updated in self.updated_rows(whole):
            merged[rows] = updated
        return merged

    def updated_rows(self, whole: Callable[[Tensor], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """The weight with the update added in fp32, some rows [n, in] at a time; see merged_weight."""
        weight, lora_a, lora_b = whole(self.weight), whole(self.lora_A).float(), whole(self.lora_B)
        for rows in row_blocks(weight):
            yield rows, self.base_rows(weight, rows) + self.scaling * (lora_b[rows].float() @ lora_a)

    def base_rows(self, weight: Tensor, rows: slice) -> Tensor:
        """Some rows [n, in] of the frozen weight in fp32."""
        if self.weight_scale is None:
            return weight[rows].float()
        return dequantize_rows(weight[rows], self.weight_scale[rows], torch.float32)
