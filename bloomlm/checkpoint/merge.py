"""Write a model with its adapter merged into the weights as a plain Hugging Face directory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.adapters.base import adapter_of
from bloomlm.checkpoint.main_rank import one_directory
from bloomlm.checkpoint.output import Report, WritesItself, no_report, output_directory
from bloomlm.checkpoint.writer import DEFAULT_SHARD_SIZE_BYTES, write_model
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.layout import is_of_base, without_shards
from bloomlm.parallel.mesh import ALONE, Mesh


def merge_to_directory(
    model: BloomForCausalLM,
    directory: Path,
    *,
    tokenizer: WritesItself | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
    report: Report = no_report,
    mesh: Mesh = ALONE,
) -> None:
    """Write a model with its adapter merged into the weights; the model itself does not change.

    One layer at a time is merged, so a model that load_model has mapped is never in memory as a whole.

    Args:
        model: with an adapter that can be merged, or without one.
        directory: the directory to write; replaced as a whole if it holds a model already.
        tokenizer: written beside the weights.
        dtype: precision to write; None: the model's precision. Updates are added in fp32 and rounded once.
        max_shard_size_bytes: as in write_model.
        report: called with a number of bytes after each write.
        mesh: the ranks among which the model is divided; all of them must call this.

    Raises:
        AdapterError: the adapter cannot be merged, or the weights are quantised, more coarsely than an update.
        CheckpointError: the directory holds other files, or cannot be written.
    """
    adapter = adapter_of(model)
    if adapter is not None and adapter.cannot_merge is not None:
        raise AdapterError(f"a {adapter.kind} adapter cannot be merged: {adapter.cannot_merge}")
    if model.transformer.is_quantized:
        raise AdapterError(
            "the model's weights were quantised when it was loaded; load it without that, and the adapter into it"
        )
    with one_directory(output_directory(directory, merged_bytes(model, dtype), tokenizer), mesh) as temporary:
        write_model(
            temporary,
            model.config,
            merged_parameters(model, dtype),
            dtype=dtype,
            max_shard_size_bytes=max_shard_size_bytes,
            report=report,
            mesh=mesh,
        )


def merged_bytes(model: BloomForCausalLM, dtype: torch.dtype | None = None) -> int:
    """Size of the parameters that merge_to_directory writes."""
    return model.config.num_parameters * (dtype or model.transformer.dtype).itemsize


def merged_parameters(model: BloomForCausalLM, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters with its adapter merged in, one at a time; an adapter that cannot be merged is left out.

    Args:
        model: with or without an adapter.
        dtype: precision of a merged weight; None: the precision of the weight before merging.

    Yields:
        Published name and tensor.
    """
    adapter = adapter_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_of_base(name):
                merged_dtype = dtype or parameter.dtype
                yield name, parameter if adapter is None else adapter.merged(model, name, without_shards, merged_dtype)
