"""apply_adapter: what learns is a value (FullTuning, LoraConfig, PrefixConfig); model and loop stay the same."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bloomlm.adapters.lora import LoraConfig, LoRALinear
from bloomlm.adapters.prefix import PrefixConfig, PrefixEncoder
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM


@dataclass(frozen=True)
class FullTuning:
    """Every weight learns."""


Adapter = FullTuning | LoraConfig | PrefixConfig


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
        AdapterError: the model has an adapter already.
    """
    if adapter_config(model) is not None:
        raise AdapterError("the model has an adapter already; merge it or load the base model again")
    if model.transformer.is_quantized and not isinstance(adapter, LoraConfig):
        raise AdapterError("a model in int8 learns through LoRA only; load it without int8")
    model.requires_grad_(isinstance(adapter, FullTuning))
    if isinstance(adapter, LoraConfig):
        for name, linear in _block_linears(model, adapter.target_modules):
            parent, _, attribute = name.rpartition(".")
            layer = LoRALinear.from_linear(linear, adapter, name, generator, device)
            setattr(model.get_submodule(parent), attribute, layer)
        for name in adapter.replaced_names:
            model.get_parameter(name).requires_grad_(True)
    elif isinstance(adapter, PrefixConfig):
        embedding = model.transformer.word_embeddings.weight
        with torch.device("meta"):
            encoder = PrefixEncoder(adapter, model.config)
        encoder.to_empty(device=device or embedding.device).to(embedding.dtype)
        encoder.init_weights(model.config.initializer_range, generator)
        model.transformer.prefix = encoder.train(model.training)


def adapter_config(model: BloomForCausalLM) -> LoraConfig | PrefixConfig | None:
    """The configuration of the model's adapter; None without one."""
    if isinstance(model.transformer.prefix, PrefixEncoder):
        return model.transformer.prefix.config
    return next((m.config for m in model.modules() if isinstance(m, LoRALinear)), None)


def trainable_state_dict(model: BloomForCausalLM) -> dict[str, Tensor]:
    """Name -> tensor of every parameter that learns, detached and sharing the model's memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merge_adapter(model: BloomForCausalLM) -> None:
    """Add LoRA's updates into the base weights in place, leaving a plain model.

    Raises:
        AdapterError: the model has a prefix (virtual tokens are not weights) or no adapter.
    """
    config = adapter_config(model)
    if not isinstance(config, LoraConfig):
        found = "no adapter" if config is None else "a prefix adapter, whose virtual tokens are not weights"
        raise AdapterError(f"only LoRA can be merged into the base model; it has {found}")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.merge())


def _block_linears(model: BloomForCausalLM, targets: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]
