"""LoRA: trained low-rank updates beside frozen linear layers.

Source: Hu et al., https://arxiv.org/abs/2106.09685; the scaling is lora_alpha / r, or lora_alpha / sqrt(r) for
rank-stabilised LoRA (https://arxiv.org/abs/2312.03732).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from bloomlm.adapters.base import Adapter, PeftForm, refuse_other_keys
from bloomlm.adapters.lora_linear import LoRALinear
from bloomlm.adapters.patterns import check_pattern
from bloomlm.adapters.trained_rows import PEFT_ROWS, TRAINED_ROWS, TrainedRowsEmbedding, tokens_in_peft
from bloomlm.errors import AdapterError, ConfigError, name_some
from bloomlm.model.bloom import BloomForCausalLM

T = TypeVar("T", int, float)

BLOCK_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
MOST_RANK = 2**20
EMBEDDING = "transformer.word_embeddings"
PEFT_PREFIX = "base_model.model."
PEFT_KEYS = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "trainable_token_indices",
    "use_rslora",
}
PEFT_BIASES = ("none", "all", "lora_only")
# Initialisations that leave the base model's weights unchanged; others (pissa, olora, ...) change them.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Adapter):
    """Which layers get an update, and the rank of the updates."""

    kind = "LoRA"
    path_flag = "lora_path"
    training_flag = "lora"
    accepts_quantized = True
    layer_class: ClassVar[type[LoRALinear]] = LoRALinear
    """The class that replaces a linear layer."""

    r: int = 4
    """Rank of the updates."""
    lora_alpha: float | None = None
    """Numerator of the scaling; None: 2 * r."""
    lora_dropout: float = 0.0
    """Dropout probability on the update's input."""
    target_modules: tuple[str, ...] = ("query_key_value",)
    """Block linears that learn: any of BLOCK_LINEARS."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Module name, or a regular expression for its end -> the rank there, instead of r."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Module name, or a regular expression for its end -> the value there, instead of lora_alpha."""
    trained_tokens: tuple[int, ...] = ()
    """Ids of tokens whose rows of the embedding learn; the head has the same rows."""
    replaced_names: tuple[str, ...] = ()
    """Names of the base model's parameters that learn too and are saved with the adapter: biases."""

    def __post_init__(self) -> None:
        for lora_rank in (self.r, *self.rank_pattern.values()):
            if not 1 <= lora_rank <= MOST_RANK:
                raise ConfigError(f"LoRA's r is {lora_rank}; expected a number from 1 to {MOST_RANK}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check_pattern(pattern)
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

    def describe(self) -> str:
        """Rank, layers and the number of trained rows of the embedding."""
        rows = f" and {len(self.trained_tokens):,} rows of the embedding" if self.trained_tokens else ""
        return f"{self.kind} of rank {self.r} on {', '.join(self.target_modules)}{rows}"

    def install(self, model: BloomForCausalLM, generator: torch.Generator | None, device: torch.device | None) -> None:
        """Put an update beside each of its layers, and trained rows beside the embedding."""
        for name, linear in self._targets(model):
            parent, _, attribute = name.rpartition(".")
            layer = self.layer_class.from_linear(linear, self, name, generator, device)
            setattr(model.get_submodule(parent), attribute, layer)
        for name in self.replaced_names:
            model.get_parameter(name).requires_grad_(True)
        if self.trained_tokens:
            if max(self.trained_tokens) >= model.config.vocab_size:
                raise AdapterError(
                    f"the adapter trains the row of token {max(self.trained_tokens)}; the model has "
                    f"{model.config.vocab_size}"
                )
            base = model.transformer
            base.word_embeddings = TrainedRowsEmbedding.from_embedding(base.word_embeddings, self, base.dtype, device)

    def start_from_weights(self, model: BloomForCausalLM) -> None:
        """Copy the rows of trained_tokens from the embedding."""
        embedding = model.transformer.word_embeddings
        if isinstance(embedding, TrainedRowsEmbedding):
            embedding.start_from_weight()

    def layers(self, model: BloomForCausalLM) -> Iterator[tuple[str, LoRALinear]]:
        """Full name and layer of every layer with an update."""
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                yield name, module

    def parameter_names(self, model: BloomForCausalLM) -> list[str]:
        """The parameters of the updates, replaced_names, and the trained rows."""
        return list(self.peft_keys(model))

    def merged(
        self, model: BloomForCausalLM, name: str, whole: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """A layer's weight with its update added, the embedding with its trained rows; other parameters unchanged."""
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, LoRALinear | TrainedRowsEmbedding) and attribute == "weight":
            return module.merged_weight(whole, dtype)
        return model.get_parameter(name)

    def peft_keys(self, model: BloomForCausalLM) -> dict[str, str]:
        """In PEFT's keys matrices of an update are modules, and a bias beside an update is one module deeper."""
        updates = [f"{name}.{own}" for name, layer in self.layers(model) for own in layer.own_names]
        keys = {name: f"{PEFT_PREFIX}{name}.weight" for name in updates}
        keys |= {name: self._bias_key(name) for name in self.replaced_names}
        if self.trained_tokens:
            keys[f"{EMBEDDING}.{TRAINED_ROWS}"] = f"{PEFT_PREFIX}{EMBEDDING}.{PEFT_ROWS}"
        return keys

    def to_peft(self, model: BloomForCausalLM) -> PeftForm:
        """The configuration, the updates, the trained biases and the trained rows.

        Raises:
            AdapterError: other parameters of the base model were trained too.
        """
        if others := [name for name in self.replaced_names if not name.endswith(".bias")]:
            raise AdapterError(
                f"PEFT's files cannot hold {name_some(others)}, which this adapter trained beside its updates; merge "
                "it into its base model instead"
            )
        values = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": _whole(self.alpha),
            "lora_dropout": self.lora_dropout,
            "target_modules": list(self.target_modules),
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in self.alpha_pattern.items()},
            "bias": "all" if self.replaced_names else "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "trainable_token_indices": list(self.trained_tokens) or None,
            "revision": None,
        }
        tensors = {key: model.get_parameter(name) for name, key in self.peft_keys(model).items()}
        return PeftForm(values=values, tensors=tensors, own_tensors={})

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], keys: Collection[str], model: BloomForCausalLM) -> Self:
        """The configuration. The keys of the weights tell which biases were trained too."""
        refuse_other_keys(values, PEFT_KEYS)
        bias = values.get("bias", "none")
        if bias not in PEFT_BIASES:
            raise AdapterError(f"bias is {bias!r}; expected one of {', '.join(PEFT_BIASES)}")
        if values.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
            raise AdapterError(
                f"init_lora_weights is {values['init_lora_weights']!r}, which changes the base model too; convert the "
                "adapter with PEFT (save_pretrained's path_initial_model_for_weight_conversion)"
            )
        try:
            config = cls(
                r=int(values["r"]),
                lora_alpha=float(values["lora_alpha"]),
                lora_dropout=float(values.get("lora_dropout") or 0.0),
                target_modules=_chosen_linears(values.get("target_modules"), model),
                use_rslora=bool(values.get("use_rslora")),
                trained_tokens=tokens_in_peft(values.get("trainable_token_indices"), model.config.vocab_size),
                rank_pattern={str(k): int(v) for k, v in (values.get("rank_pattern") or {}).items()},
                alpha_pattern={str(k): float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise AdapterError(f"its configuration lacks a value, or has one of another kind: {error!r}") from error
        if bias == "none":
            return config
        biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
        replaced_names = tuple(name for name in biases if config._bias_key(name) in keys)
        if not replaced_names:
            raise AdapterError(f"bias is {bias!r}, and its weights hold no biases; save it again with PEFT")
        return dataclasses.replace(config, replaced_names=replaced_names)

    def _targets(self, model: BloomForCausalLM) -> list[tuple[str, nn.Linear]]:
        return [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in self.target_modules
        ]

    def _bias_key(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        deeper = ".base_layer" if module.rpartition(".")[2] in self.target_modules else ""
        return f"{PEFT_PREFIX}{module}{deeper}.{kind}"


def _match(pattern_values: Mapping[str, T], module_name: str, default: T) -> T:
    """The value of the first pattern that matches the whole name or its end after a dot, as in PEFT."""
    for pattern, value in pattern_values.items():
        if re.match(rf"(.*\.)?({pattern})$", module_name):
            return value
    return default


def _chosen_linears(target_modules: object, model: BloomForCausalLM) -> tuple[str, ...]:
    """The block linears that PEFT's target_modules chooses: names' ends, a regular expression, or "all-linear"."""
    module_names = [name for name, _ in model.named_modules() if name]
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(target_modules, str):
        if target_modules.lower() == "all-linear":
            chosen = set(linear_names)
        else:
            pattern = check_pattern(target_modules)
            chosen = {name for name in (*module_names, "lm_head") if re.fullmatch(pattern, name)}
    elif isinstance(target_modules, list) and target_modules:
        ends = tuple(f".{name}" for name in target_modules)
        chosen = {name for name in (*module_names, "lm_head") if f".{name}".endswith(ends)}
    else:
        raise AdapterError(f"target_modules is {target_modules!r}; expected a list of names or an expression")
    if others := sorted(chosen - set(linear_names)):
        raise AdapterError(
            f"target_modules {target_modules!r} chooses {name_some(others)}; bloomlm's LoRA covers the linear layers "
            f"of the blocks only ({', '.join(BLOCK_LINEARS)})"
        )
    targets = tuple(end for end in BLOCK_LINEARS if any(name.rpartition(".")[2] == end for name in chosen))
    if not targets:
        raise AdapterError(f"target_modules {target_modules!r} chooses no layer of the model")
    if left_out := [name for name in linear_names if name.rpartition(".")[2] in targets and name not in chosen]:
        raise AdapterError(
            f"target_modules {target_modules!r} leaves out {name_some(left_out)}; bloomlm's LoRA covers a kind of "
            "layer in all blocks or in none"
        )
    return targets


def _whole(number: float) -> int | float:
    """3.0 -> 3, as PEFT types its alphas."""
    return int(number) if float(number).is_integer() else number
