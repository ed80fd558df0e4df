"""Tensors that lie in Paddle's files: their place is known, their bytes are read when asked for.

A read copies: pickle puts arrays at any offset, so a mapping would be misaligned for three tensors out of four. It
reads the bytes of the slice and no others, leaves no mapped pages behind, and its result owns aligned memory.
"""

import codecs
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bloomlm.checkpoint.fresh_memory import fresh_memory
from bloomlm.errors import CheckpointError

TEXT_BLOCK_BYTES = 8 * 2**20
MIN_BYTES_TO_READ_AHEAD = 2**20
READ_AHEAD_BYTES = 128 * 2**20


class LazyTensor(Protocol):
    """A tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it will be read."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        ...

    @property
    def has_rows_together(self) -> bool:
        """Whether a slice of dimension 0 is read as fast as its share of the whole."""
        ...

    def read(self) -> Tensor:
        """All of it, in memory of its own."""
        ...

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim."""
        ...


class StoredFile:
    """An open file; a tensor of it can be read even after another file has taken its name."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Args:
            path: the file.

        Raises:
            CheckpointError: it cannot be opened.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self.size_bytes = os.fstat(self._descriptor).st_size
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from offset on.

        Raises:
            CheckpointError: the file ends before the buffer is full.
        """
        while len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
            if not count:
                raise CheckpointError(f"{self.path} ended at byte {offset} while it was being read; fetch it again")
            buffer, offset = buffer[count:], offset + count

    def read_ahead(self, offset: int) -> None:
        """Tell the system that the bytes from offset on come next, so that it fetches them meanwhile."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class StoredArray:
    """An array whose bytes lie in one piece, little endian."""

    file: StoredFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    fortran_order: bool = False

    @property
    def has_rows_together(self) -> bool:
        """Unless it is stored column by column, or has no rows."""
        return bool(self.shape) and not self.fortran_order

    def read(self) -> Tensor:
        """All of it."""
        if not self.shape:
            return StoredArray(self.file, self.offset, (1,), self.dtype).read()[0]
        return self.read_slice(0, 0, self.shape[0])

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim; nothing else is read."""
        if self.fortran_order:
            last = len(self.shape) - 1
            stored = StoredArray(self.file, self.offset, self.shape[::-1], self.dtype)
            return stored.read_slice(last - dim, start, stop).permute(*range(last, -1, -1))
        _check_slice(self.shape, dim, start, stop)
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        row_bytes = math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        piece_bytes, stride_bytes = (stop - start) * row_bytes, self.shape[dim] * row_bytes
        pieces = math.prod(self.shape[:dim])
        if piece_bytes == stride_bytes:
            pieces, piece_bytes = 1, pieces * piece_bytes
        raw = fresh_memory(math.prod(shape) * self.dtype.itemsize)
        if raw.numel():
            buffer = memoryview(raw.numpy().data)
            for piece in range(pieces):
                place = piece * piece_bytes
                offset = self.offset + piece * stride_bytes + start * row_bytes
                self.file.read_into(buffer[place : place + piece_bytes], offset)
            if stop - start == self.shape[dim] and len(buffer) >= MIN_BYTES_TO_READ_AHEAD:
                self.file.read_ahead(self.offset + len(buffer))  # whole tensors are read one after another
        return raw.view(self.dtype).view(shape)


@dataclass(frozen=True)
class EncodedArray:
    """An array whose bytes a pickle of protocol 2 or 3 spells as text: each byte a Latin-1 character in UTF-8."""

    file: StoredFile
    offset: int
    text_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    fortran_order: bool = False

    @property
    def has_rows_together(self) -> bool:
        """No: a slice is read through all of its text."""
        return False

    def read(self) -> Tensor:
        """All of it, for no place in the text can be computed; some megabytes of text are decoded at a time."""
        raw = fresh_memory(math.prod(self.shape) * self.dtype.itemsize)
        buffer = memoryview(raw.numpy().data) if raw.numel() else memoryview(bytearray())
        num_decoded = 0
        for decoded in self._decode():
            if num_decoded + len(decoded) <= len(buffer):
                buffer[num_decoded : num_decoded + len(decoded)] = decoded
            num_decoded += len(decoded)
        if num_decoded != len(buffer):
            raise CheckpointError(
                f"{self.file.path}: an array of shape {list(self.shape)} ({self.dtype}) needs {len(buffer)} bytes, "
                f"its text gives {num_decoded}; the file is damaged"
            )
        if self.fortran_order:
            return raw.view(self.dtype).view(self.shape[::-1]).permute(*range(len(self.shape) - 1, -1, -1))
        return raw.view(self.dtype).view(self.shape)

    def _decode(self) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        text = bytearray(min(self.text_bytes, TEXT_BLOCK_BYTES))
        for start in range(0, self.text_bytes, TEXT_BLOCK_BYTES):
            stop = min(start + TEXT_BLOCK_BYTES, self.text_bytes)
            piece = memoryview(text)[: stop - start]
            self.file.read_into(piece, self.offset + start)
            try:
                yield decoder.decode(piece, final=stop == self.text_bytes).encode("latin-1")
            except UnicodeError as error:
                raise CheckpointError(f"{self.file.path}: an array's text is no Latin-1 in UTF-8: {error}") from error

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim."""
        _check_slice(self.shape, dim, start, stop)
        return self.read().narrow(dim, start, stop - start).clone()


@dataclass(frozen=True)
class Transposed:
    """A stored matrix [in, out] as the published one [out, in]: a view of what is read."""

    stored: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Reversed."""
        return self.stored.shape[::-1]

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.stored.dtype

    @property
    def has_rows_together(self) -> bool:
        """No: its rows are stored as columns."""
        return False

    def read(self) -> Tensor:
        """All of it."""
        return self.stored.read().t()

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim."""
        return self.stored.read_slice(1 - dim, start, stop).t()


@dataclass(frozen=True)
class Joined:
    """Pieces of a tensor one after another along a dimension."""

    pieces: tuple[LazyTensor, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.pieces[0].shape)
        shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of every piece."""
        return self.pieces[0].dtype

    @property
    def has_rows_together(self) -> bool:
        """Where the pieces are runs of rows."""
        return self.dim == 0 and all(piece.has_rows_together for piece in self.pieces)

    def read(self) -> Tensor:
        """All of it; memory for the whole and one piece."""
        return self.read_slice(self.dim, 0, self.shape[self.dim])

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim; pieces without any of them stay unread."""
        _check_slice(self.shape, dim, start, stop)
        shape = list(self.shape)
        shape[dim] = stop - start
        whole = fresh_memory(math.prod(shape) * self.dtype.itemsize).view(self.dtype).view(shape)
        position = 0
        for piece in self.pieces:
            length = piece.shape[self.dim]
            if dim != self.dim:
                whole.narrow(self.dim, position, length).copy_(piece.read_slice(dim, start, stop))
            else:
                first, last = max(start, position), min(stop, position + length)
                if first < last:
                    part = piece.read_slice(dim, first - position, last - position)
                    whole.narrow(dim, first - start, last - first).copy_(part)
            position += length
        return whole


@dataclass(frozen=True)
class Reshaped:
    """A flat tensor read in another shape, row by row."""

    flat: LazyTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.flat.dtype

    @property
    def has_rows_together(self) -> bool:
        """As the flat tensor."""
        return self.flat.has_rows_together

    def read(self) -> Tensor:
        """All of it."""
        return self.flat.read().view(self.shape)

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim; only those of the first dimension lie in one piece."""
        _check_slice(self.shape, dim, start, stop)
        if dim:
            return self.read().narrow(dim, start, stop - start).clone()
        row = math.prod(self.shape[1:])
        return self.flat.read_slice(0, start * row, stop * row).view(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Replicated:
    """Copies of a tensor that several ranks hold; every read compares them."""

    copies: tuple[LazyTensor, ...]
    name: str
    places: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every copy."""
        return self.copies[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Of every copy."""
        return self.copies[0].dtype

    @property
    def has_rows_together(self) -> bool:
        """Where every copy has."""
        return all(copy.has_rows_together for copy in self.copies)

    def read(self) -> Tensor:
        """The first copy.

        Raises:
            CheckpointError: another one differs in any bit.
        """
        return self._agreed([copy.read() for copy in self.copies])

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim.

        Raises:
            CheckpointError: another copy differs there in any bit.
        """
        return self._agreed([copy.read_slice(dim, start, stop) for copy in self.copies])

    def _agreed(self, copies: Sequence[Tensor]) -> Tensor:
        first = copies[0].contiguous()
        for place, other in zip(self.places[1:], copies[1:], strict=True):
            if not torch.equal(first.view(torch.uint8), other.contiguous().view(torch.uint8)):
                difference = float((first.double() - other.double()).abs().max())
                raise CheckpointError(
                    f"{self.name} is whole on every rank, yet {self.places[0]} and {place} differ by up to "
                    f"{difference:.3g}: the files are of different runs or steps; put those of one save together"
                )
        return first


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor in memory, where a lazy one is expected."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.tensor.dtype

    @property
    def has_rows_together(self) -> bool:
        """In memory, all of them."""
        return self.tensor.dim() > 0

    def read(self) -> Tensor:
        """The tensor itself."""
        return self.tensor

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim."""
        return self.tensor.narrow(dim, start, stop - start)


def _check_slice(shape: tuple[int, ...], dim: int, start: int, stop: int) -> None:
    assert 0 <= dim < len(shape) and 0 <= start <= stop <= shape[dim], (shape, dim, start, stop)
