"""Put one of PaddleNLP's adapters into a model, as the plain adapter that computes the same."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bloomlm.adapters.apply import apply_adapter
from bloomlm.checkpoint.paddle.adapter_files import LORA_CONFIG_FILE, PREFIX_CONFIG_FILE
from bloomlm.checkpoint.paddle.lora import PaddleLora, read_paddle_lora
from bloomlm.checkpoint.paddle.prefix import PaddlePrefix, PrefixLayout, read_paddle_prefix
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig


def find_paddle_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in PaddleNLP's files."""
    return any((directory / name).is_file() for name in (LORA_CONFIG_FILE, PREFIX_CONFIG_FILE))


def read_paddle_adapter(
    directory: Path,
    model_config: BloomConfig,
    *,
    prefix_layout: PrefixLayout | None = None,
    trained_tensor_parallel_degree: int | None = None,
) -> PaddleLora | PaddlePrefix:
    """Read an adapter of either kind.

    Args:
        directory: the adapter.
        model_config: of the base model.
        prefix_layout: of a prefix; None: as the files tell.
        trained_tensor_parallel_degree: ranks that trained it; None: as the files tell.

    Raises:
        AdapterError: there is none or one of each kind, its files are missing or damaged, do not fit the model, or
            leave open what they mean.
    """
    is_lora, is_prefix = ((directory / name).is_file() for name in (LORA_CONFIG_FILE, PREFIX_CONFIG_FILE))
    if is_lora == is_prefix:
        found = "both" if is_lora else "neither"
        raise AdapterError(f"{directory}: expected {LORA_CONFIG_FILE} or {PREFIX_CONFIG_FILE}, found {found}")
    if is_lora:
        if prefix_layout is not None:
            raise AdapterError(f"{directory} holds a LoRA adapter; a prefix_layout means nothing to it")
        return read_paddle_lora(directory, model_config, trained_tensor_parallel_degree=trained_tensor_parallel_degree)
    return read_paddle_prefix(
        directory,
        model_config,
        prefix_layout=prefix_layout,
        trained_tensor_parallel_degree=trained_tensor_parallel_degree,
    )


def install_paddle_adapter(model: BloomForCausalLM, adapter: PaddleLora | PaddlePrefix) -> None:
    """Put an adapter into a model as an ordinary LoRA or prefix, which can be saved in PEFT's files.

    Args:
        model: its base model, without an adapter; parameters that the adapter replaces (trained biases) are replaced.
        adapter: what read_paddle_adapter gave.

    Raises:
        AdapterError: the model has an adapter already.
    """
    generator = torch.Generator(model.transformer.word_embeddings.weight.device)
    if isinstance(adapter, PaddleLora):
        apply_adapter(model, adapter.config, generator)
        _give_values(model, adapter.plain(adapter.stored), adapter.replaced_names)
        return
    config, tensors = adapter.plain(model.config)
    apply_adapter(model, config, generator)
    assert model.transformer.prefix is not None
    _give_values(model.transformer.prefix, tensors)


def resume_paddle_adapter(model: BloomForCausalLM, adapter: PaddleLora | PaddlePrefix) -> None:
    """Put an adapter into a model so that training goes on exactly as it would have in PaddleNLP.

    Unlike install_paddle_adapter: entries of lora_B outside the era's blocks get no gradient, trained biases go on
    learning, and a prefix keeps the encoder it was trained with, whose parameters PEFT's files cannot hold.

    Args:
        model: its base model, without an adapter.
        adapter: what read_paddle_adapter gave.

    Raises:
        AdapterError: the model has an adapter already.
    """
    if isinstance(adapter, PaddlePrefix):
        apply_adapter(model, adapter.config, torch.Generator(model.transformer.word_embeddings.weight.device))
        encoder = adapter.encoder(model.config)
        model.transformer.prefix = encoder.to(model.transformer.word_embeddings.weight.device).train(model.training)
        return
    install_paddle_adapter(model, adapter)
    for name in adapter.replaced_names:
        model.get_parameter(name).requires_grad_(True)
    for name, trained in adapter.trained_entries().items():
        if not trained.all():
            parameter = model.get_parameter(name)
            parameter.register_hook(_Mask(trained.to(parameter.device)))


class _Mask:
    """A gradient hook that keeps some entries."""

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._kept


def _give_values(module: nn.Module, tensors: Mapping[str, Tensor], replaced_names: Collection[str] = ()) -> None:
    """Set parameters; the adapter's own stay in their precision where the model's is lower."""
    for name, tensor in tensors.items():
        parameter = module.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise AdapterError(f"{name} has shape {list(tensor.shape)}; expected {list(parameter.shape)}")
        promoted = torch.promote_types(parameter.dtype, tensor.dtype)
        dtype = parameter.dtype if name in replaced_names else promoted
        owned = torch.empty(tensor.shape, dtype=dtype, device=parameter.device).copy_(tensor)
        parent, _, attribute = name.rpartition(".")
        new = nn.Parameter(owned, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(parent), attribute, new)
