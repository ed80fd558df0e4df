"""One safetensors file, opened without reading its tensors.

The safetensors package is not used because its tensors are views of one mapping of the whole file. Here every tensor
has its own storage (so that torch.save writes that tensor alone), a mapping lives only while a tensor uses it (so that
a converted tensor leaves no pages in memory), and errors name the file and its size.

Source: the format, https://github.com/huggingface/safetensors#format: 8 bytes of header length, little endian;
the header, JSON of name -> dtype, shape, data_offsets; the tensors' bytes without gaps.
"""

import itertools
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomlm.checkpoint.tensor_reader import Rows, TensorEntry, fresh_memory
from bloomlm.errors import CheckpointError
from bloomlm.files.json_text import parse_json
from bloomlm.parallel.layout import Bounds

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """The content of a file's header, which agrees with the size of the file."""

    metadata: Mapping[str, str]
    """Texts that the writer added, such as its format."""
    entries: Mapping[str, TensorEntry]
    """Name -> shape and dtype of a tensor."""
    offsets: Mapping[str, int]
    """Name -> offset in the file of a tensor's first byte."""


class SafetensorsFile:
    """The tensors of one file, mapped privately: changing one changes memory, never the file."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: as read_header.
        """
        self.path = path
        header = read_header(path)
        self.entries, self._offsets = header.entries, header.offsets
        self._identity = _identity(path.stat())
        self._mapping: weakref.ref[mmap.mmap] | None = None

    def read(self, name: str) -> Tensor:
        """One tensor, mapped; copied only if the file does not align it."""
        entry = self.entries[name]
        if not num_bytes(entry):
            return torch.empty(entry.shape, dtype=entry.dtype)
        offset = self._offsets[name]
        mapping = self._map()
        if offset % entry.dtype.itemsize:
            raw = torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes(entry), offset=offset)
            return raw.clone().view(entry.dtype).view(entry.shape)
        flat = torch.frombuffer(mapping, dtype=entry.dtype, count=math.prod(entry.shape), offset=offset)
        return flat.view(entry.shape)

    def read_box(self, name: str, bounds: Bounds) -> Tensor:
        """A copy of the part of one tensor within bounds, (start, stop) of each dimension; other bytes are not read.

        Raises:
            CheckpointError: the file cannot be read.
        """
        entry = self.entries[name]
        shape = [stop - start for start, stop in bounds]
        raw = fresh_memory(math.prod(shape) * entry.dtype.itemsize)
        if raw.numel():
            self._read_runs(memoryview(raw.numpy().data), self._offsets[name], entry, bounds)
        return raw.view(entry.dtype).view(shape)

    def _read_runs(self, buffer: memoryview, offset: int, entry: TensorEntry, bounds: Bounds) -> None:
        strides = [math.prod(entry.shape[dim + 1 :]) * entry.dtype.itemsize for dim in range(len(bounds))]
        # the wanted bytes are contiguous from the last dimension that is cut
        last = max((d for d, (start, stop) in enumerate(bounds) if stop - start < entry.shape[d]), default=0)
        run_bytes = (bounds[last][1] - bounds[last][0]) * strides[last]
        first = offset + sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
        rows = itertools.product(*(range(stop - start) for start, stop in bounds[:last]))
        try:
            with self._open() as file:
                for number, index in enumerate(rows):
                    position = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
                    _fill(file.fileno(), buffer[number * run_bytes : (number + 1) * run_bytes], position)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def _open(self) -> FileIO:
        file = self.path.open("rb", buffering=0)
        if _identity(os.fstat(file.fileno())) != self._identity:
            file.close()
            raise CheckpointError(f"{self.path} changed while it was being read; load the model again")
        return file

    def _map(self) -> mmap.mmap:
        mapping = self._mapping() if self._mapping is not None else None
        if mapping is None:
            try:
                with self._open() as file:
                    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path} cannot be mapped: {error}") from error
            self._mapping = weakref.ref(mapping)
        return mapping


def read_header(path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> SafetensorsHeader:
    """Read a file's header and compare it with the size of the file.

    Args:
        path: the file.
        dtypes: name of a dtype in the header -> dtype.

    Raises:
        CheckpointError: the file cannot be read, is cut short or damaged, or is not a safetensors file.
    """
    fields, data_start = _read_json_header(path)
    metadata = fields.pop("__metadata__", {})
    places = {name: _parse_entry(path, name, values, dtypes) for name, values in fields.items()}
    position = 0
    for name, (entry, start) in sorted(places.items(), key=lambda item: item[1][1]):
        if start != position:
            raise CheckpointError(f"{path} is damaged: by its header the data of {name} overlap others or leave a gap")
        position += num_bytes(entry)
    found, expected = path.stat().st_size, data_start + position
    if found != expected:
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {found} bytes, its header says {expected}; fetch it again"
        )
    return SafetensorsHeader(
        metadata=metadata,
        entries={name: entry for name, (entry, _) in places.items()},
        offsets={name: data_start + start for name, (_, start) in places.items()},
    )


def num_bytes(entry: TensorEntry) -> int:
    """Size of a tensor's data."""
    return math.prod(entry.shape) * entry.dtype.itemsize


def build_header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds tensors in the given order.

    Args:
        entries: name -> shape and dtype.
        metadata: texts to keep in the header.

    Returns:
        The file's first bytes, padded to 64, and the offset in the file of each tensor's data.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    starts: dict[str, int] = {}
    for name, entry in entries.items():
        starts[name] = position
        position += num_bytes(entry)
        fields[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [starts[name], position],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    # data starts at a cache line, so that each vector load of a mapped file touches one line
    text += b" " * (-(LENGTH_BYTES + len(text)) % 64)
    data_start = LENGTH_BYTES + len(text)
    return struct.pack("<Q", len(text)) + text, {name: data_start + start for name, start in starts.items()}


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's data as in the file, row by row."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def row_blocks(tensor: Tensor | Rows, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor's rows in contiguous blocks of some megabytes in the precision to write, without a copy of the whole.

    Args:
        tensor: has at least one dimension and any strides; a transposed tensor is copied block by block, and only one
            block of Rows is in memory.
        dtype: precision of the blocks.

    Raises:
        CheckpointError: a number is too large for float16.
    """
    if not math.prod(tensor.shape):
        return
    row_bytes = math.prod(tensor.shape[1:]) * max(tensor.dtype.itemsize, dtype.itemsize)
    for rows in tensor.split(max(1, BLOCK_BYTES // row_bytes)):
        rows = rows.detach()
        if rows.dim() == 2 and rows.stride(1) != 1:
            # transposed twice, so that both copies read and write contiguous memory
            rows = rows.t().contiguous().t()
        block = rows.contiguous().to(dtype)
        if dtype is torch.float16 and rows.dtype is not dtype and not torch.equal(block.isinf(), rows.isinf()):
            raise CheckpointError(
                f"a number of {float(rows.abs().max()):.4g} is too large for float16, whose largest is 65504; write "
                "bfloat16 or float32 instead"
            )
        yield block


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors into a new file in their order, one at a time.

    Raises:
        CheckpointError: it cannot be written.
    """
    entries = {name: TensorEntry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    try:
        with path.open("wb") as file:
            file.write(build_header(entries, metadata)[0])
            for tensor in tensors.values():
                file.write(raw_bytes(tensor))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _fill(descriptor: int, buffer: memoryview, position: int) -> None:
    while len(buffer):
        count = os.preadv(descriptor, [buffer], position)
        if not count:
            raise OSError(f"it ended at byte {position}")
        buffer, position = buffer[count:], position + count


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Numbers that change when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's fields, and the offset of the first tensor."""
    try:
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == LENGTH_BYTES else 0
            text = file.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not length or len(text) != length:
        raise CheckpointError(
            f"{path} is cut short or not a safetensors file: its {path.stat().st_size} bytes do not hold a header; "
            "fetch it again (a file of a few hundred bytes is often a git-lfs pointer)"
        )
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("__metadata__", {}), dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object of objects")
    return fields, LENGTH_BYTES + length


def _parse_entry(path: Path, name: str, fields: Any, dtypes: Mapping[str, torch.dtype]) -> tuple[TensorEntry, int]:
    """A tensor's shape and dtype, and the offset of its data from the first tensor's."""
    try:
        entry = TensorEntry(tuple(fields["shape"]), dtypes[fields["dtype"]])
        start, stop = fields["data_offsets"]
        if not all(type(number) is int for number in (*entry.shape, start, stop)):
            raise TypeError("sizes and offsets are whole numbers")
        if start < 0 or min(entry.shape, default=0) < 0 or stop - start != num_bytes(entry):
            raise ValueError("shape and data_offsets do not agree")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: its header has the entry {str(fields)[:200]} for {name}; expected a shape, a dtype of "
            f"{', '.join(dtypes)}, and data_offsets that agree with them"
        ) from error
    return entry, start
