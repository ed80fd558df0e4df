"""What learns in a model: the protocol that every kind of adapter implements.

An adapter is a frozen value, for example LoraConfig(r=8). `apply_adapter` puts its parameters into a model, and
`adapter_of` returns the adapter of a model. Code outside this package asks the adapter and never tests for a kind. The
table in parallel/layout.py says how tensor-parallel ranks cut the parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

# Keys of adapter_config.json that do not change what a trained adapter computes.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_hidden_size",  # prompt_embeddings are stored after the projection
    "ensure_weight_tying",  # acts on layers that we refuse
    "fan_in_fan_out",  # PEFT itself turns it off for linear layers
    "inference_mode",
    "init_weights",
    "layers_pattern",  # acts with layers_to_transform
    "megatron_core",  # acts with megatron_config
    "peft_type",
    "peft_version",
    "prefix_projection",  # the same as encoder_hidden_size
    "qalora_group_size",  # acts with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """The contents of an adapter's files in the format of PEFT."""

    values: Mapping[str, Any]
    """The contents of adapter_config.json."""
    tensors: Mapping[str, Tensor]
    """The tensors of adapter_model.safetensors."""
    own_tensors: Mapping[str, Tensor]
    """The tensors of `Adapter.own_file`; empty where there is no such file."""


class Adapter(ABC):
    """What learns in a model: all of its weights, updates of its layers, or tokens before every sequence."""

    kind: ClassVar[str]
    """Name of the kind in messages."""
    path_flag: ClassVar[str]
    """The flag that takes a directory with an adapter of this kind only."""
    training_flag: ClassVar[str | None] = None
    """The flag of `bloomlm finetune` that chooses it; None: it is chosen without a flag."""
    trains_base: ClassVar[bool] = False
    """Whether the base model's own weights learn, so that a checkpoint is a whole model."""
    accepts_quantized: ClassVar[bool] = False
    """Whether the base model may be quantised."""
    cannot_merge: ClassVar[str | None] = None
    """Why it cannot be merged into the base model's weights; None: it can."""
    own_file: ClassVar[str | None] = None
    """Name of our own file with the trained parameters, if PEFT's files hold only the result of these; else None."""

    @property
    def num_virtual_tokens(self) -> int:
        """Number of virtual tokens that it puts before every sequence."""
        return 0

    @abstractmethod
    def install(self, model: BloomForCausalLM, generator: torch.Generator | None, device: torch.device | None) -> None:
        """Add the parameters that learn to a model that is frozen; see apply_adapter."""

    def start_from_weights(self, model: BloomForCausalLM) -> None:  # noqa: B027 (most kinds have no such values)
        """Set initial values that are computed from the base model's weights.

        `install` does so where the weights are loaded. Where ranks divide a model, its adapter is installed first, and
        this is called after the weights have been read.
        """

    @abstractmethod
    def parameter_names(self, model: BloomForCausalLM) -> list[str]:
        """Full names of its parameters in a model where it is installed."""

    @abstractmethod
    def describe(self) -> str:
        """A short description, for example "LoRA of rank 4 on query_key_value"."""

    def merged(
        self, model: BloomForCausalLM, name: str, whole: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """One of the base model's parameters with the adapter merged into it, computed in fp32 and rounded once.

        Args:
            model: a model where it is installed. If ranks divide the model, all of them must call this.
            name: name of a parameter of the base model.
            whole: gathers the shards of a tensor.
            dtype: precision of a merged weight.

        Returns:
            The merged weight, or the parameter itself where the adapter does not act on it.
        """
        return model.get_parameter(name)

    def scaling_of(self, module_name: str) -> float:
        """The factor by which the adapter's update of a module is multiplied; 1 for kinds without updates."""
        return 1.0

    def plain(self, model: BloomForCausalLM, tensors: Mapping[str, Tensor]) -> tuple["Adapter", Mapping[str, Tensor]]:
        """An adapter that computes the same and that files can hold.

        Args:
            model: a model where this adapter is installed.
            tensors: the whole parameters of this adapter by their names in the model.

        Returns:
            The adapter for files, and its parameters by their names in the model.
        """
        return self, tensors

    def peft_keys(self, model: BloomForCausalLM) -> dict[str, str]:
        """Name of each of its parameters in a model where it is installed -> the key in PEFT's file."""
        raise AdapterError(f"PEFT's files cannot hold {self.kind}")

    def to_peft(self, model: BloomForCausalLM) -> PeftForm:
        """The contents of PEFT's files for this adapter, which is installed in the model.

        Raises:
            AdapterError: PEFT's files cannot hold this adapter.
        """
        raise AdapterError(f"PEFT's files cannot hold {self.kind}")

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], keys: Collection[str], model: BloomForCausalLM) -> Self:
        """The adapter in PEFT's files.

        Args:
            values: the contents of adapter_config.json.
            keys: keys of the tensors in the file of weights.
            model: the base model without an adapter; it may be on the meta device.

        Raises:
            AdapterError: the configuration asks for what bloomlm does not have, or does not fit the model.
        """
        raise AdapterError(f"PEFT's files cannot hold {cls.kind}")

    def with_own_tensors(
        self, own_tensors: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model_config: BloomConfig
    ) -> tuple["Adapter", Mapping[str, Tensor]]:
        """The adapter in the form in which it was trained, from `own_file`.

        Args:
            own_tensors: the contents of own_file.
            tensors: the contents of PEFT's file, by the names of this adapter's parameters in a model.
            model_config: configuration of the base model.

        Returns:
            The trained adapter, and its parameters by their names in a model.

        Raises:
            AdapterError: the two files belong to two adapters.
        """
        raise AdapterError(f"{self.kind} has no own_file")


class AdapterModule:
    """Mixin of the modules that an adapter puts into a model."""

    config: Adapter


@dataclass(frozen=True)
class FullTuning(Adapter):
    """Every weight learns."""

    kind = "full tuning"
    path_flag = "model_name_or_path"
    trains_base = True

    def install(self, model: BloomForCausalLM, generator: torch.Generator | None, device: torch.device | None) -> None:
        """Let all parameters learn."""
        model.requires_grad_(True)

    def parameter_names(self, model: BloomForCausalLM) -> list[str]:
        """The names of all parameters."""
        return [name for name, _ in model.named_parameters()]

    def describe(self) -> str:
        """All weights learn."""
        return "all weights"


def apply_adapter(
    model: BloomForCausalLM,
    adapter: Adapter,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> None:
    """Install an adapter in place and let exactly its parameters learn.

    Args:
        model: a model without an adapter. The adapter's parameters are whole even if the model's are cut for ranks.
        adapter: what learns.
        generator: randomness for fresh parameters of the adapter.
        device: where these go; None: where the model is.

    Raises:
        AdapterError: the model has an adapter already, or is quantised, which the adapter does not accept.
    """
    if adapter_of(model) is not None:
        raise AdapterError("the model has an adapter already; merge it or load the base model again")
    if model.transformer.is_quantized and not adapter.accepts_quantized:
        raise AdapterError("a quantised model learns through LoRA only; load it without quantisation")
    model.requires_grad_(False)
    adapter.install(model, generator, device)


def adapter_of(model: BloomForCausalLM) -> Adapter | None:
    """The adapter that is installed in a model; None without one."""
    return next((module.config for module in model.modules() if isinstance(module, AdapterModule)), None)


def refuse_other_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse an adapter_config.json with settings that bloomlm does not have.

    Raises:
        AdapterError: a key is set that is neither in `known` nor in WITHOUT_EFFECT.
    """
    for key, value in values.items():
        if key not in known and key not in WITHOUT_EFFECT and value not in (None, False, "", [], {}):
            raise AdapterError(f"{key} is {value!r}, which bloomlm does not support; expected it to be unset")


def set_parameter(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    """Replace a parameter, given by its full name, with a tensor."""
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=requires_grad))
