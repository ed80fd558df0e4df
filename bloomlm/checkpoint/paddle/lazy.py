"""Lazy tensors of Paddle's files: arrays at known offsets, and tensors made of other lazy ones.

Arrays are read by copying and not mapped, because pickle puts them at any offset, where three tensors out of four would
be misaligned. Only the bytes of a slice are read, no mapped pages stay behind, and the result owns aligned memory.
"""

import codecs
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.checkpoint.tensor_reader import LazyTensor, fresh_memory
from bloomlm.errors import CheckpointError

TEXT_BLOCK_BYTES = 8 * 2**20
MIN_BYTES_TO_READ_AHEAD = 2**20
READ_AHEAD_BYTES = 128 * 2**20


class StoredFile:
    """An open file, whose tensors can be read even after another file replaced it."""

    def __init__(self, path: Path) -> None:
        """Open a file.

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
            except OverflowError as error:
                raise CheckpointError(f"{self.path} is damaged: it places data at byte {offset}") from error
            if not count:
                raise CheckpointError(f"{self.path} ended at byte {offset} while it was being read; fetch it again")
            buffer, offset = buffer[count:], offset + count

    def read_ahead(self, offset: int) -> None:
        """Ask the system to fetch the bytes from an offset on, because they are read next."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def stored_array(
    file: StoredFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype, *, fortran_order: bool = False
) -> LazyTensor:
    """A little-endian array whose bytes are contiguous; a slice reads no other bytes.

    Args:
        file: the file that holds it.
        offset: its first byte.
        shape: its shape.
        dtype: its dtype.
        fortran_order: whether it is stored column by column.
    """
    if fortran_order:
        return _reversed(stored_array(file, offset, shape[::-1], dtype))

    def read_slice(dim: int, start: int, stop: int) -> Tensor:
        check_slice(shape, dim, start, stop)
        return _read_array(file, offset, shape, dtype, dim, start, stop)

    def read() -> Tensor:
        return read_slice(0, 0, shape[0]) if shape else _read_array(file, offset, (1,), dtype, 0, 0, 1)[0]

    return LazyTensor(shape, dtype, read, read_slice, has_rows_together=bool(shape))


def encoded_array(
    file: StoredFile,
    offset: int,
    text_bytes: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    fortran_order: bool = False,
) -> LazyTensor:
    """An array whose bytes are text, as in pickles of protocol 2 and 3: each byte is a Latin-1 character in UTF-8.

    Every read decodes the whole text, some megabytes at a time, because offsets in it cannot be computed.

    Args:
        file: the file that holds it.
        offset: the first byte of the text.
        text_bytes: length of the text.
        shape: its shape.
        dtype: its dtype.
        fortran_order: whether it is stored column by column.
    """
    if fortran_order:
        return _reversed(encoded_array(file, offset, text_bytes, shape[::-1], dtype))

    def read() -> Tensor:
        raw = fresh_memory(math.prod(shape) * dtype.itemsize)
        buffer = memoryview(raw.numpy().data) if raw.numel() else memoryview(bytearray())
        num_decoded = 0
        for decoded in _decode(file, offset, text_bytes):
            if num_decoded + len(decoded) <= len(buffer):
                buffer[num_decoded : num_decoded + len(decoded)] = decoded
            num_decoded += len(decoded)
        if num_decoded != len(buffer):
            raise CheckpointError(
                f"{file.path} is damaged: an array of shape {list(shape)} ({dtype}) needs {len(buffer)} bytes, and its "
                f"text holds {num_decoded}; fetch it again"
            )
        return raw.view(dtype).view(shape)

    def read_slice(dim: int, start: int, stop: int) -> Tensor:
        check_slice(shape, dim, start, stop)
        return read().narrow(dim, start, stop - start).clone()

    return LazyTensor(shape, dtype, read, read_slice)


def held(tensor: Tensor) -> LazyTensor:
    """A tensor in memory as a lazy one."""

    def read_slice(dim: int, start: int, stop: int) -> Tensor:
        return tensor.narrow(dim, start, stop - start)

    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor, read_slice, tensor.dim() > 0)


def transposed(stored: LazyTensor) -> LazyTensor:
    """A stored matrix [in, out] as the published one [out, in]."""

    def read_slice(dim: int, start: int, stop: int) -> Tensor:
        return stored.read_slice(1 - dim, start, stop).t()

    return LazyTensor(stored.shape[::-1], stored.dtype, lambda: stored.read().t(), read_slice)


def reshaped(flat: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A flat tensor in another shape, in row-major order; slices of all but dimension 0 read the whole tensor."""
    row = math.prod(shape[1:])

    def read_slice(dim: int, start: int, stop: int) -> Tensor:
        check_slice(shape, dim, start, stop)
        if dim:
            return flat.read().view(shape).narrow(dim, start, stop - start).clone()
        return flat.read_slice(0, start * row, stop * row).view(stop - start, *shape[1:])

    return LazyTensor(shape, flat.dtype, lambda: flat.read().view(shape), read_slice, flat.has_rows_together)


def joined(pieces: Sequence[LazyTensor], joined_dim: int) -> LazyTensor:
    """The concatenation of pieces of one dtype along a dimension.

    Reading takes memory for the result and one piece; pieces that hold no part of a slice are not read.
    """
    lengths = [piece.shape[joined_dim] for piece in pieces]
    first_shape, dtype = pieces[0].shape, pieces[0].dtype
    shape = (*first_shape[:joined_dim], sum(lengths), *first_shape[joined_dim + 1 :])

    def read_slice(dim: int, start: int, stop: int) -> Tensor:
        check_slice(shape, dim, start, stop)
        own_shape = (*shape[:dim], stop - start, *shape[dim + 1 :])
        whole = fresh_memory(math.prod(own_shape) * dtype.itemsize).view(dtype).view(own_shape)
        position = 0
        for piece, length in zip(pieces, lengths, strict=True):
            if dim != joined_dim:
                whole.narrow(joined_dim, position, length).copy_(piece.read_slice(dim, start, stop))
            else:
                first, last = max(start, position), min(stop, position + length)
                if first < last:
                    part = piece.read_slice(dim, first - position, last - position)
                    whole.narrow(dim, first - start, last - first).copy_(part)
            position += length
        return whole

    has_rows_together = joined_dim == 0 and all(piece.has_rows_together for piece in pieces)
    return LazyTensor(shape, dtype, lambda: read_slice(joined_dim, 0, shape[joined_dim]), read_slice, has_rows_together)


def replicated(copies: Sequence[LazyTensor], name: str, places: Sequence[str]) -> LazyTensor:
    """A tensor that each of several ranks holds.

    Every read compares all copies, and raises CheckpointError if they differ in any bit.

    Args:
        copies: the tensor of each rank, of one shape and dtype.
        name: its name in the error message.
        places: the file of each rank in the error message.
    """

    def agreed(read: list[Tensor]) -> Tensor:
        first = read[0].contiguous()
        for place, other in zip(places[1:], read[1:], strict=True):
            if not torch.equal(first.view(torch.uint8), other.contiguous().view(torch.uint8)):
                difference = float((first.double() - other.double()).abs().max())
                raise CheckpointError(
                    f"every rank holds the same {name}, but in {places[0]} and {place} it differs by up to "
                    f"{difference:.3g}: they were saved by different runs or at different steps; put the files of one "
                    "save together"
                )
        return first

    return LazyTensor(
        copies[0].shape,
        copies[0].dtype,
        lambda: agreed([copy.read() for copy in copies]),
        lambda dim, start, stop: agreed([copy.read_slice(dim, start, stop) for copy in copies]),
        all(copy.has_rows_together for copy in copies),
    )


def check_slice(shape: tuple[int, ...], dim: int, start: int, stop: int) -> None:
    """Assert that entries start to stop of dimension dim exist."""
    assert 0 <= dim < len(shape) and 0 <= start <= stop <= shape[dim], (shape, dim, start, stop)


def _reversed(stored: LazyTensor) -> LazyTensor:
    """A lazy tensor with its dimensions in reverse order, for arrays that are stored column by column."""
    dims = tuple(range(len(stored.shape) - 1, -1, -1))

    def read_slice(dim: int, start: int, stop: int) -> Tensor:
        return stored.read_slice(dims[dim], start, stop).permute(dims)

    return LazyTensor(stored.shape[::-1], stored.dtype, lambda: stored.read().permute(dims), read_slice)


def _read_array(
    file: StoredFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype, dim: int, start: int, stop: int
) -> Tensor:
    own_shape = (*shape[:dim], stop - start, *shape[dim + 1 :])
    row_bytes = math.prod(shape[dim + 1 :]) * dtype.itemsize
    piece_bytes, stride_bytes = (stop - start) * row_bytes, shape[dim] * row_bytes
    pieces = math.prod(shape[:dim])
    if piece_bytes == stride_bytes:
        pieces, piece_bytes = 1, pieces * piece_bytes
    raw = fresh_memory(math.prod(own_shape) * dtype.itemsize)
    if raw.numel():
        buffer = memoryview(raw.numpy().data)
        for piece in range(pieces):
            place = piece * piece_bytes
            file.read_into(buffer[place : place + piece_bytes], offset + piece * stride_bytes + start * row_bytes)
        if stop - start == shape[dim] and len(buffer) >= MIN_BYTES_TO_READ_AHEAD:
            file.read_ahead(offset + len(buffer))  # whole tensors are read in the order of the file
    return raw.view(dtype).view(own_shape)


def _decode(file: StoredFile, offset: int, text_bytes: int) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = bytearray(min(text_bytes, TEXT_BLOCK_BYTES))
    for start in range(0, text_bytes, TEXT_BLOCK_BYTES):
        stop = min(start + TEXT_BLOCK_BYTES, text_bytes)
        piece = memoryview(text)[: stop - start]
        file.read_into(piece, offset + start)
        try:
            yield decoder.decode(piece, final=stop == text_bytes).encode("latin-1")
        except UnicodeError as error:
            raise CheckpointError(
                f"{file.path} is damaged: the text of an array is not Latin-1 in UTF-8 ({error}); fetch it again"
            ) from error
