"""DoRA: a low-rank update that turns the rows of a weight, and a trained length for each row.

Source: Liu et al., https://arxiv.org/abs/2402.09353: y = x (m / |V|)^T V^T + b with V = W + scaling * B A and a trained
magnitude m for each row. The norms of V's rows, |V|, get no gradient (section 4.3), as in PEFT.

Shapes: N tokens, R lora rank.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from bloomlm.adapters.base import PeftForm
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.lora_linear import LoRALinear
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.linear import linear
from bloomlm.model.quantized import row_blocks
from bloomlm.model.shard import own_part

MAGNITUDE = "lora_magnitude_vector"


class DoraLinear(LoRALinear):
    """A LoRALinear with lora_magnitude_vector [out] beside its matrices."""

    own_names = (*LoRALinear.own_names, MAGNITUDE)
    lora_magnitude_vector: nn.Parameter
    _kept_norms: tuple[list[tuple[int, int]], Tensor] | None = None
    """Addresses and versions of the parameters, and the norms that belong to them."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: LoraConfig,
        module_name: str,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> "DoraLinear":
        """Wrap a layer. If its weight is loaded and whole, the wrapped layer computes the same as before."""
        layer = super().from_linear(linear, config, module_name, generator, device)
        assert isinstance(layer, DoraLinear)
        layer.lora_magnitude_vector = nn.Parameter(layer.lora_A.new_ones(linear.out_features))
        if not layer.weight.is_meta and layer.num_weights == linear.out_features * linear.in_features:
            layer.start_from_weight()
        return layer

    @torch.no_grad()
    def start_from_weight(self) -> None:
        """Set the magnitudes to the norms of the weight's rows; under FSDP, of the rows that this rank holds."""
        weight = own_part(self.weight)
        squares = torch.empty(len(weight), device=weight.device)
        for rows in row_blocks(weight):
            squares[rows] = self.base_rows(weight, rows).square().sum(1)
        own_part(self.lora_magnitude_vector).copy_(self.partition.leave(squares).sqrt())

    def norms(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        """[out] norms in fp32 of the whole rows of the updated weight; see merged_weight for the argument."""
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            squares = torch.cat([updated.square().sum(1) for _, updated in self.updated_rows(whole)])
            return self.partition.leave(squares).sqrt()

    def row_scale(self) -> Tensor:
        """The trained magnitudes over the norms, which are computed once in eval mode until a parameter changes."""
        return self.lora_magnitude_vector.float() / self._current_norms()

    def train(self, mode: bool = True) -> Self:
        """Change the mode, and compute the norms anew: FSDP changes parameters without counting their versions."""
        self._kept_norms = None
        return super().train(mode)

    @property
    def num_weight_products(self) -> int:
        """2 with dropout, because x and the dropped x are multiplied with the weight."""
        return 2 if self.config.lora_dropout else 1

    @property
    def pass_flops(self) -> int:
        """The product of lora_B and lora_A for the norms."""
        return 2 * self.num_weights * len(self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        dropped = self.dropped(x)
        update = linear(self.low_rank(dropped), self.learning_b()) * self.scaling
        base = self.without_bias(x)
        scale = self.row_scale()
        if dropped is x:
            scaled = scale * (base + update)
        else:  # dropout acts on every change of the base's result, also on the scaling of its rows
            scaled = base + (scale - 1) * self.without_bias(dropped) + scale * update
        return (scaled + self.bias).to(base.dtype)

    def merged_weight(self, whole: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """[out, in] the updated weight, its rows scaled to the trained magnitudes; see LoRALinear."""
        merged = super().merged_weight(whole, torch.float32)
        scale = whole(self.lora_magnitude_vector).float() / self.norms(whole)
        return merged.mul_(scale[:, None]).to(dtype)

    def _current_norms(self) -> Tensor:
        parameters = (self.weight, self.lora_A, self.lora_B)
        if self.training or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return self.norms()
        versions = [(p.data_ptr(), p._version) for p in parameters]
        if self._kept_norms is None or self._kept_norms[0] != versions:
            with torch.inference_mode(False):  # the norms may be used where gradients are computed
                self._kept_norms = versions, self.norms()
        return self._kept_norms[1]


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """Which layers get an update and magnitudes, and the rank of the updates."""

    kind = "DoRA"
    layer_class = DoraLinear

    def start_from_weights(self, model: BloomForCausalLM) -> None:
        """Set every magnitude to the norm of its row, and the rows of trained_tokens to the embedding's."""
        super().start_from_weights(model)
        for _, layer in self.layers(model):
            assert isinstance(layer, DoraLinear)
            layer.start_from_weight()

    def peft_keys(self, model: BloomForCausalLM) -> dict[str, str]:
        """As for LoRA; the key of a magnitude has no ".weight"."""
        keys = super().peft_keys(model)
        return {name: key.removesuffix(".weight") if name.endswith(MAGNITUDE) else key for name, key in keys.items()}

    def to_peft(self, model: BloomForCausalLM) -> PeftForm:
        """As for LoRA, with use_dora and the magnitudes."""
        form = super().to_peft(model)
        return dataclasses.replace(form, values={**form.values, "use_dora": True})

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], keys: Collection[str], model: BloomForCausalLM) -> Self:
        """As for LoRA, with use_dora."""
        return super().from_peft({key: value for key, value in values.items() if key != "use_dora"}, keys, model)
