"""What every file format offers: named tensors, read one at a time, whole or in part.

A format (huggingface.py, ...) turns its own names, layouts and files into this; reader.py builds models from it and
knows no format.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bloomlm.parallel.gather import Bounds


@dataclass(frozen=True)
class TensorEntry:
    """What a checkpoint says of a tensor before it is read."""

    shape: tuple[int, ...]
    """In the published orientation: a linear's weight is (out, in)."""
    dtype: torch.dtype
    """As stored."""


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows are read when they are needed, some at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    """Rows from the first number up to the second."""

    def split(self, num_rows: int) -> Iterator[Tensor]:
        """All of them in order, so many at a time."""
        for start in range(0, self.shape[0], num_rows):
            yield self.read_rows(start, min(start + num_rows, self.shape[0]))


class TensorReader(Protocol):
    """The tensors of a checkpoint under their published names ("transformer.h.0.input_layernorm.weight")."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every parameter of the checkpoint; reading this reads no tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; where the format allows it is a private mapping of the file, not a copy."""
        ...

    def open(self, name: str) -> Tensor | Rows:
        """One tensor for somebody who goes through its rows once: as read gives it, or without taking memory for it."""
        ...

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim; where the format allows nothing else is read."""
        ...

    def read_box(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within bounds of every dimension; the same."""
        ...
