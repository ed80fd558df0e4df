"""Write one plain Hugging Face directory from a model and what it learned."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bloomlm.adapters.lora import LoRALinear
from bloomlm.checkpoint.writer import DEFAULT_SHARD_SIZE_BYTES, atomic_directory, write_model
from bloomlm.errors import AdapterError, CheckpointError
from bloomlm.model.bloom import BloomForCausalLM


class WritesItself(Protocol):
    """A tokenizer, which belongs into the same directory."""

    def save(self, directory: Path) -> None:
        """Write its files into an existing directory."""
        ...


def merge_to_directory(
    model: BloomForCausalLM,
    directory: Path,
    *,
    tokenizer: WritesItself | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
) -> None:
    """Write a model with its LoRA added into the weights; the model itself does not change.

    One layer at a time is added up, so a model that load_model has mapped goes from file to file.

    Args:
        model: with LoRA, or plain.
        directory: where to; replaced as a whole if it holds a model already.
        tokenizer: written beside the weights.
        dtype: precision to write; None: the model's. Updates are added in fp32 and rounded once.
        max_shard_size_bytes: as write_model's.

    Raises:
        AdapterError: the model has a prefix, which cannot be merged.
        CheckpointError: the directory holds something else, or cannot be written.
    """
    if model.transformer.prefix is not None:
        raise AdapterError("a prefix adapter cannot be merged: its virtual tokens are no weights; save it as it is")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds files, and no model that could be replaced; name another directory")
    with atomic_directory(directory) as temporary:
        write_model(
            temporary,
            model.config,
            merged_parameters(model, dtype),
            dtype=dtype,
            max_shard_size_bytes=max_shard_size_bytes,
        )
        if tokenizer is not None:
            tokenizer.save(temporary)


def merged_parameters(model: BloomForCausalLM, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """A plain model's parameters, LoRA added in, one at a time.

    Args:
        model: with LoRA, or plain.
        dtype: precision of a merged weight; None: that of the weight.

    Yields:
        Published name and tensor.
    """
    updates = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in updates:
                yield name, (parameter.float() + updates[name].delta()).to(dtype or parameter.dtype)
            elif not name.endswith((".lora_A", ".lora_B")):
                yield name, parameter
