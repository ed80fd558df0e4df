"""Lazy tensors that are made of others: transposed, joined, reshaped, compared, or held in memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomlm.checkpoint.fresh_memory import fresh_memory
from bloomlm.checkpoint.paddle.stored import check_slice
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import CheckpointError


@dataclass(frozen=True)
class Transposed:
    """A stored matrix [in, out] as the published one [out, in]."""

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
        """False: its rows are stored as columns."""
        return False

    def read(self) -> Tensor:
        """All of it."""
        return self.stored.read().t()

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim."""
        return self.stored.read_slice(1 - dim, start, stop).t()


@dataclass(frozen=True)
class Joined:
    """The concatenation of pieces along a dimension."""

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
        """True if the pieces are blocks of rows that have their rows together."""
        return self.dim == 0 and all(piece.has_rows_together for piece in self.pieces)

    def read(self) -> Tensor:
        """All of it; takes memory for the whole and one piece."""
        return self.read_slice(self.dim, 0, self.shape[self.dim])

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim; pieces without any of them are not read."""
        check_slice(self.shape, dim, start, stop)
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
    """A flat tensor in another shape, in row-major order."""

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
        """Rows start to stop of dimension dim; for all but the first dimension the whole is read."""
        check_slice(self.shape, dim, start, stop)
        if dim:
            return self.read().narrow(dim, start, stop - start).clone()
        row = math.prod(self.shape[1:])
        return self.flat.read_slice(0, start * row, stop * row).view(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Replicated:
    """A tensor of which several ranks hold copies, which every read compares."""

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
        """True if every copy has its rows together."""
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
    """A tensor in memory as a lazy one."""

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
        """True unless it is a single number."""
        return self.tensor.dim() > 0

    def read(self) -> Tensor:
        """The tensor itself."""
        return self.tensor

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim."""
        return self.tensor.narrow(dim, start, stop - start)
