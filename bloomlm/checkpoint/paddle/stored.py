"""Arrays in Paddle's files: their offsets are known, their bytes are read on demand.

Reading copies, because pickle puts arrays at any offset and a mapping would be misaligned for three tensors out of
four. It reads the bytes of the slice and no others, leaves no mapped pages behind, and its result owns aligned memory.
"""

import codecs
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.checkpoint.fresh_memory import fresh_memory
from bloomlm.errors import CheckpointError

TEXT_BLOCK_BYTES = 8 * 2**20
MIN_BYTES_TO_READ_AHEAD = 2**20
READ_AHEAD_BYTES = 128 * 2**20


class StoredFile:
    """An open file, whose tensors can be read even after another file replaced it."""

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
        """Ask the system to fetch the bytes from an offset on, because they are read next."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class StoredArray:
    """A little-endian array whose bytes are contiguous."""

    file: StoredFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    fortran_order: bool = False

    @property
    def has_rows_together(self) -> bool:
        """True unless it is stored column by column, or has no rows."""
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
        check_slice(self.shape, dim, start, stop)
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
                self.file.read_ahead(self.offset + len(buffer))  # whole tensors are read in the order of the file
        return raw.view(self.dtype).view(shape)


@dataclass(frozen=True)
class EncodedArray:
    """An array whose bytes are text, as in pickles of protocol 2 and 3: each byte is a Latin-1 character in UTF-8."""

    file: StoredFile
    offset: int
    text_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    fortran_order: bool = False

    @property
    def has_rows_together(self) -> bool:
        """False: for a slice all of the text is read."""
        return False

    def read(self) -> Tensor:
        """All of it, because offsets in the text cannot be computed; some megabytes of text are decoded at a time."""
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
        check_slice(self.shape, dim, start, stop)
        return self.read().narrow(dim, start, stop - start).clone()


def check_slice(shape: tuple[int, ...], dim: int, start: int, stop: int) -> None:
    """Assert that rows start to stop of dimension dim exist."""
    assert 0 <= dim < len(shape) and 0 <= start <= stop <= shape[dim], (shape, dim, start, stop)
