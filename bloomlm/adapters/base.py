"""What learns in a model: the protocol that every kind of adapter implements.

An adapter is a frozen value, such as LoraConfig(r=8). `apply_adapter` puts its parameters into a model, `adapter_of`
finds it there again. Code outside this package asks the adapter what it needs to know and never tests for a kind.
How tensor-parallel ranks cut an adapter's parameters stands with all others' in parallel/layout.py.
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

# Keys of adapter_config.json that do not change what an adapter computes once its weights are there.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_hidden_size",  # prompt_embeddings are stored after the projection
    "ensure_weight_tying",  # of layers that we refuse
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
    """An adapter as PEFT keeps it in files."""

    values: Mapping[str, Any]
    """The contents of adapter_config.json."""
    tensors: Mapping[str, Tensor]
    """Those of adapter_model.safetensors."""
    own_tensors: Mapping[str, Tensor]
    """Those of `Adapter.own_file`; empty: no such file."""


class Adapter(ABC):
    """What learns in a model: all of its weights, updates of its layers, or tokens before every sequence."""

    kind: ClassVar[str]
    """Name of the kind in messages."""
    path_flag: ClassVar[str]
    """The flag that takes a directory of this kind only."""
    training_flag: ClassVar[str | None] = None
    """The flag of fine-tuning that lets it learn; None: no flag does, as for full tuning."""
    trains_base: ClassVar[bool] = False
    """The base model's own weights learn, so that a checkpoint of it is a whole model."""
    accepts_int8: ClassVar[bool] = False
    """The base model may be in int8."""
    cannot_merge: ClassVar[str | None] = None
    """Why it cannot be added into the base model's weights; None: it can."""
    own_file: ClassVar[str | None] = None
    """Name of a file of ours beside PEFT's with the trained parameters, where PEFT's files hold only their result."""

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that it puts before every sequence."""
        return 0

    @abstractmethod
    def install(self, model: BloomForCausalLM, generator: torch.Generator | None, device: torch.device | None) -> None:
        """Put parameters that learn into a model in which nothing does; see apply_adapter."""

    def start_from_weights(self, model: BloomForCausalLM) -> None:  # noqa: B027 (most kinds have no such values)
        """Set the first values that follow from the base model's weights.

        To be called when the weights have been read into a model in which the adapter was installed before them, as it
        is where ranks divide the model; `install` does it where the weights are there.
        """

    @abstractmethod
    def parameter_names(self, model: BloomForCausalLM) -> list[str]:
        """Full names of the parameters that belong to it in a model where it is installed."""

    @abstractmethod
    def describe(self) -> str:
        """What it is in a few words, such as "LoRA of rank 4 on query_key_value"."""

    def merged(
        self, model: BloomForCausalLM, name: str, whole: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """One of the base model's parameters with the adapter merged into it, computed in fp32 and rounded once.

        Args:
            model: where it is installed; of a model that is divided among ranks, all of them must call this.
            name: of the base model's parameter.
            whole: gathers the shards of a tensor.
            dtype: of a merged weight.

        Returns:
            The merged weight, or the parameter itself where the adapter does not act on it.
        """
        return model.get_parameter(name)

    def scaling_of(self, module_name: str) -> float:
        """The factor by which the adapter's update of a module is multiplied; 1 for kinds without updates."""
        return 1.0

    def plain(self, model: BloomForCausalLM, tensors: Mapping[str, Tensor]) -> tuple["Adapter", Mapping[str, Tensor]]:
        """An adapter of an ordinary kind that computes the same, which files can hold.

        Args:
            model: where this one is installed.
            tensors: its whole parameters by their names in the model.

        Returns:
            That adapter and its parameters.
        """
        return self, tensors

    def peft_keys(self, model: BloomForCausalLM) -> dict[str, str]:
        """Name of each of its parameters in a model where it is installed -> its key in PEFT's file."""
        raise AdapterError(f"PEFT's files cannot hold {self.kind}")

    def to_peft(self, model: BloomForCausalLM) -> PeftForm:
        """The contents of PEFT's files for this adapter, as it is installed in a model.

        Raises:
            AdapterError: they cannot hold this one.
        """
        raise AdapterError(f"PEFT's files cannot hold {self.kind}")

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], keys: Collection[str], model: BloomForCausalLM) -> Self:
        """The adapter in PEFT's files.

        Args:
            values: the contents of adapter_config.json.
            keys: of the tensors in the file of weights.
            model: the base model, without an adapter; one on the meta device will do.

        Raises:
            AdapterError: a key asks for what bloomlm does not do, or the adapter does not fit the model.
        """
        raise AdapterError(f"PEFT's files cannot hold {cls.kind}")

    def with_own_tensors(
        self, own_tensors: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model_config: BloomConfig
    ) -> tuple["Adapter", Mapping[str, Tensor]]:
        """The adapter as it learned, from `own_file`.

        Args:
            own_tensors: the contents of that file.
            tensors: of this adapter, as PEFT's file has them, by their names in a model.
            model_config: of the base model.

        Returns:
            That adapter and its parameters by their names in a model.

        Raises:
            AdapterError: the two files belong to two adapters.
        """
        raise AdapterError(f"{self.kind} has no file of its own")


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
        """All of the model's."""
        return [name for name, _ in model.named_parameters()]

    def describe(self) -> str:
        """What learns."""
        return "all weights"


def apply_adapter(
    model: BloomForCausalLM,
    adapter: Adapter,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> None:
    """Install an adapter in place and let exactly its parameters learn.

    Args:
        model: a model without an adapter. If its weights are cut for ranks, the adapter's are whole all the same.
        adapter: what learns.
        generator: randomness for fresh adapter weights.
        device: where those go; None: where the model is.

    Raises:
        AdapterError: the model has an adapter already, or its weights are in int8 and the adapter needs others.
    """
    if adapter_of(model) is not None:
        raise AdapterError("the model has an adapter already; merge it or load the base model again")
    if model.transformer.is_quantized and not adapter.accepts_int8:
        raise AdapterError("a model in int8 learns through LoRA only; load it without int8")
    model.requires_grad_(False)
    adapter.install(model, generator, device)


def adapter_of(model: BloomForCausalLM) -> Adapter | None:
    """The adapter that is installed in a model; None without one."""
    return next((module.config for module in model.modules() if isinstance(module, AdapterModule)), None)


def refuse_other_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse an adapter_config.json that asks for more than its kind's known keys.

    Raises:
        AdapterError: a key outside `known` is set, and is not one of those without effect.
    """
    for key, value in values.items():
        if key not in known and key not in WITHOUT_EFFECT and value not in (None, False, "", [], {}):
            raise AdapterError(f"{key} is {value!r}, which bloomlm does not do; expected it to be unset")


def set_parameter(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    """Put a tensor in the place of a parameter, by its full name."""
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=requires_grad))
