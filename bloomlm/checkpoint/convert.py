"""Convert a model between the formats that bloomlm reads and writes, one tensor at a time."""

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from bloomlm.checkpoint.formats import FileForm, bytes_on_ranks, check_degree, write_model_for_ranks
from bloomlm.checkpoint.huggingface import EMBEDDING
from bloomlm.checkpoint.output import Report, WritesItself, no_report, output_directory
from bloomlm.checkpoint.reader import open_reader, read_config
from bloomlm.checkpoint.safetensors_file import row_blocks
from bloomlm.checkpoint.tensor_reader import Rows, TensorReader, check_entries, empty_model
from bloomlm.checkpoint.writer import DEFAULT_SHARD_SIZE_BYTES, write_model
from bloomlm.errors import CheckpointError, ConfigError, name_some
from bloomlm.files.atomic import sync
from bloomlm.model.config import BloomConfig

T = TypeVar("T", Tensor, Tensor | Rows)


@dataclass(frozen=True, kw_only=True)
class ModelConversion:
    """A model and the files to write it in; creating one reads no tensor."""

    config: BloomConfig
    """The model's configuration."""
    reader: TensorReader
    """The model's tensors."""
    form: FileForm
    """Format of the files to write."""
    dtype: torch.dtype
    """Precision to write."""
    tensor_parallel_degree: int = 1
    """Number of ranks to cut the model for; more than 1 needs a format that supports ranks."""
    max_shard_size_bytes: int | None = None
    """Largest size of one file; None: 5 GB in Hugging Face's format, no limit in the other."""

    @property
    def written_bytes(self) -> int:
        """Size of the tensors to write, over all files."""
        return bytes_on_ranks(self.config, self.dtype, self.tensor_parallel_degree)

    @property
    def verified_bytes(self) -> int:
        """Size of the tensors of the whole model, each counted once."""
        return bytes_on_ranks(self.config, self.dtype, 1)


def open_model_conversion(
    directory: Path,
    form: FileForm,
    *,
    dtype: torch.dtype | None = None,
    tensor_parallel_degree: int = 1,
    max_shard_size_bytes: int | None = None,
) -> ModelConversion:
    """Check that a model can be converted, before any tensor is read or written.

    Args:
        directory: the model, in any format that bloomlm reads.
        form: format of the files to write.
        dtype: precision to write; None: the precision in which the model is stored.
        tensor_parallel_degree: number of ranks to cut it for; more than 1 needs a format that supports ranks.
        max_shard_size_bytes: largest size of one file; None: the default of the format.

    Raises:
        CheckpointError: there is no model, it is incomplete, or it has mixed precision and no dtype is given.
        ConfigError: the model cannot be divided among so many ranks, or the format does not support ranks.
    """
    config = read_config(directory)
    check_ranks(form, tensor_parallel_degree)
    check_degree(config, tensor_parallel_degree)
    reader = open_reader(directory, config)
    expected = {name: tuple(p.shape) for name, p in empty_model(config).named_parameters()}
    try:
        check_entries(expected, reader.entries)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    stored = reader.entries[EMBEDDING].dtype
    if dtype is None and (others := [name for name, entry in reader.entries.items() if entry.dtype != stored]):
        raise CheckpointError(
            f"{directory} is of mixed precision: {EMBEDDING} is {stored}, and {name_some(others)} "
            f"{'is' if len(others) == 1 else 'are'} not; name the precision to write (--dtype)"
        )
    return ModelConversion(
        config=config,
        reader=reader,
        form=form,
        dtype=dtype or stored,
        tensor_parallel_degree=tensor_parallel_degree,
        max_shard_size_bytes=max_shard_size_bytes,
    )


def check_ranks(form: FileForm, tensor_parallel_degree: int) -> None:
    """Refuse more than one rank for a format that does not support ranks.

    Raises:
        ConfigError: the format does not support so many ranks.
    """
    if tensor_parallel_degree != 1 and not form.supports_ranks:
        for_ranks = next(other.value for other in FileForm if other.supports_ranks)
        raise ConfigError(
            f"tensor_parallel_degree is {tensor_parallel_degree}, and Hugging Face's files are never cut for ranks; "
            f"leave it out, or write files that are (--to {for_ranks})"
        )


def convert_model(
    conversion: ModelConversion,
    directory: Path,
    *,
    tokenizer: WritesItself | None = None,
    verify: bool = False,
    report: Report = no_report,
    report_verified: Report = no_report,
) -> None:
    """Write a model's files, all of them or none.

    Memory holds a few blocks of one tensor, and the whole tensor where it can be neither mapped nor read row by row.

    Args:
        conversion: from open_model_conversion.
        directory: the directory to write; replaced as a whole if it holds a model already.
        tokenizer: written beside the weights.
        verify: read the written files back from the disk and compare checksums before they take their final place.
        report: called with a number of bytes after each write, written_bytes in total.
        report_verified: the same for bytes that were read back, verified_bytes in total.

    Raises:
        CheckpointError: the directory holds other files or cannot be written, a tensor cannot be read, or a written one
            reads back differently.
    """
    checksums: dict[str, int] | None = {} if verify else None
    with output_directory(directory, conversion.written_bytes, tokenizer) as temporary:
        _write(conversion, temporary, checksums, report)
        if checksums is not None:
            _verify(temporary, conversion, checksums, report_verified)


def checksum(tensor: Tensor | Rows, dtype: torch.dtype, report: Report = no_report) -> int:
    """CRC-32 of a tensor's numbers in a precision, row by row; independent of its layout in memory."""
    crc = 0
    for block in row_blocks(tensor, dtype):
        crc = zlib.crc32(block.view(torch.uint8).numpy().data, crc)
        report(block.nbytes)
    return crc


def leave_page_cache(path: Path) -> None:
    """Flush a file and, where the system can, drop it from the page cache, so that it is read from the disk."""
    sync(path)
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _write(conversion: ModelConversion, directory: Path, checksums: dict[str, int] | None, report: Report) -> None:
    if conversion.form.supports_ranks:
        write_model_for_ranks(
            directory,
            conversion.config,
            _stream(conversion, conversion.reader.read, checksums),
            dtype=conversion.dtype,
            tensor_parallel_degree=conversion.tensor_parallel_degree,
            max_shard_size_bytes=conversion.max_shard_size_bytes,
            report=report,
        )
        return
    write_model(
        directory,
        conversion.config,
        _stream(conversion, conversion.reader.open, checksums),
        dtype=conversion.dtype,
        max_shard_size_bytes=conversion.max_shard_size_bytes or DEFAULT_SHARD_SIZE_BYTES,
        report=report,
    )


def _stream(
    conversion: ModelConversion, read: Callable[[str], T], checksums: dict[str, int] | None
) -> Iterator[tuple[str, T]]:
    """The tensors in the order of the model; none is held while the next one is read."""
    for name, _ in empty_model(conversion.config).named_parameters():
        tensor = read(name)
        if checksums is not None:
            checksums[name] = checksum(tensor, conversion.dtype)
        yield name, tensor
        del tensor


def _verify(directory: Path, conversion: ModelConversion, checksums: dict[str, int], report: Report) -> None:
    for path in directory.iterdir():
        leave_page_cache(path)
    reader = open_reader(directory, read_config(directory))
    if odd := sorted(set(checksums) ^ set(reader.entries)):
        raise CheckpointError(
            f"{directory} was written, but reads back with these tensors missing or added: {name_some(odd)}"
        )
    for name, expected in checksums.items():
        entry = reader.entries[name]
        if entry.dtype != conversion.dtype or checksum(reader.read(name), conversion.dtype, report) != expected:
            raise CheckpointError(
                f"{name} was written, and reads back with another checksum; nothing was put in place. Is the disk "
                "or the memory of this machine damaged?"
            )
