"""Convert an adapter from PEFT's files or any of PaddleNLP's to PEFT's or to those of PaddleNLP 2.6.

The adapter is first read as the plain adapter that computes the same; see paddle/lora.py and paddle/prefix.py. The base
model is not needed, because the adapter's files record the sizes that it depends on.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.checkpoint.adapters.load import adapter_base_config, read_adapter
from bloomlm.checkpoint.adapters.peft import PlainAdapter, hold_adapter, save_adapter
from bloomlm.checkpoint.convert import check_ranks, leave_page_cache
from bloomlm.checkpoint.formats import READING_OF_WRITTEN_PREFIX, FileForm
from bloomlm.checkpoint.output import WritesItself, output_directory
from bloomlm.checkpoint.paddle.adapter_writer import write_paddle_adapter
from bloomlm.checkpoint.paddle.importer import AS_THE_FILES_TELL, ForeignReading
from bloomlm.checkpoint.reader import read_config
from bloomlm.checkpoint.safetensors_file import row_blocks
from bloomlm.checkpoint.source import resolve_source
from bloomlm.checkpoint.tensor_reader import empty_model
from bloomlm.errors import CheckpointError
from bloomlm.model.config import BloomConfig


@dataclass(frozen=True, kw_only=True)
class AdapterConversion:
    """An adapter, and the files to write it in."""

    adapter: PlainAdapter
    """The adapter, in the precision to write."""
    model_config: BloomConfig
    """Configuration of the base model, as far as it is known."""
    form: FileForm
    """Format of the files to write."""
    tensor_parallel_degree: int = 1
    """Number of ranks to cut the adapter for; more than 1 needs a format that supports ranks."""
    base_model_name_or_path: str | None = None
    """The base model's name, which PEFT's files record."""


def open_adapter_conversion(
    directory: Path,
    form: FileForm,
    *,
    dtype: torch.dtype | None = None,
    tensor_parallel_degree: int = 1,
    base_model_name_or_path: str | None = None,
    reading: ForeignReading = AS_THE_FILES_TELL,
) -> AdapterConversion:
    """Read an adapter.

    Args:
        directory: the adapter, in PEFT's files or in any that PaddleNLP wrote.
        form: format of the files to write.
        dtype: precision to write; None: each tensor keeps its precision.
        tensor_parallel_degree: number of ranks to cut it for; more than 1 needs a format that supports ranks.
        base_model_name_or_path: its base model; None: its shape is taken from the adapter's own tensors.
        reading: what PaddleNLP's files do not record.

    Raises:
        AdapterError: files are missing or damaged, do not fit the model, or do not record how they are to be read.
        ConfigError: the format does not support ranks.
    """
    check_ranks(form, tensor_parallel_degree)
    if base_model_name_or_path is None:
        model_config = adapter_base_config(directory)
    else:
        model_config = read_config(resolve_source(base_model_name_or_path).directory)
    adapter = read_adapter(directory, model_config, reading)
    if dtype is not None:
        tensors = {name: _converted(tensor, dtype) for name, tensor in adapter.tensors.items()}
        adapter = dataclasses.replace(adapter, tensors=tensors)
    return AdapterConversion(
        adapter=adapter,
        model_config=model_config,
        form=form,
        tensor_parallel_degree=tensor_parallel_degree,
        base_model_name_or_path=base_model_name_or_path,
    )


def convert_adapter(
    conversion: AdapterConversion, directory: Path, *, tokenizer: WritesItself | None = None, verify: bool = False
) -> None:
    """Write an adapter's files, all of them or none.

    Args:
        conversion: from open_adapter_conversion.
        directory: the directory to write; replaced as a whole if it holds an adapter already.
        tokenizer: written beside the adapter.
        verify: read the written files back from the disk and compare every bit before they take their final place.

    Raises:
        AdapterError: the format cannot hold the adapter.
        ConfigError: the adapter cannot be divided among so many ranks.
        CheckpointError: the directory holds other files or cannot be written, or a written tensor reads back
            differently.
    """
    size_bytes = sum(tensor.nbytes for tensor in conversion.adapter.tensors.values())
    with output_directory(directory, size_bytes, tokenizer) as temporary:
        if conversion.form.supports_ranks:
            write_paddle_adapter(
                temporary,
                conversion.adapter,
                conversion.model_config,
                tensor_parallel_degree=conversion.tensor_parallel_degree,
            )
        else:
            model = empty_model(conversion.model_config)
            hold_adapter(model, conversion.adapter)
            save_adapter(model, temporary, conversion.base_model_name_or_path)
        if verify:
            _verify(conversion, temporary)


def _verify(conversion: AdapterConversion, directory: Path) -> None:
    for path in directory.iterdir():
        leave_page_cache(path)
    written = conversion.adapter
    has_layout = conversion.form.supports_ranks and written.config.num_virtual_tokens > 0
    reading = READING_OF_WRITTEN_PREFIX if has_layout else AS_THE_FILES_TELL
    found = read_adapter(directory, conversion.model_config, reading)
    for name, tensor in written.tensors.items():
        module_name = name.rpartition(".")[0]
        is_scaled = math.isclose(found.config.scaling_of(module_name), written.config.scaling_of(module_name))
        if not _equal_bits(found.tensors[name], tensor) or not is_scaled:
            raise CheckpointError(
                f"{name} was written, and reads back differently; nothing was put in place. Is the disk or the memory "
                "of this machine damaged?"
            )


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else torch.cat(list(row_blocks(tensor, dtype)))
