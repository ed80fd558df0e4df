"""What every file format offers: named tensors, read one at a time, whole or in part.

Each format (huggingface.py, ...) turns its own names, layouts and files into this; reader.py builds models from it
without knowing the format.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bloomlm.errors import CheckpointError, name_some
from bloomlm.parallel.layout import Bounds


@dataclass(frozen=True)
class TensorEntry:
    """What a checkpoint says of a tensor before it is read."""

    shape: tuple[int, ...]
    """In the published orientation: a linear's weight is (out, in)."""
    dtype: torch.dtype
    """As stored."""


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows are read on demand, some at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    """Rows from the first number up to the second."""

    def split(self, num_rows: int) -> Iterator[Tensor]:
        """All rows in order, in blocks of num_rows."""
        for start in range(0, self.shape[0], num_rows):
            yield self.read_rows(start, min(start + num_rows, self.shape[0]))


class LazyTensor(Protocol):
    """A tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that `read` returns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        ...

    @property
    def has_rows_together(self) -> bool:
        """Whether the rows of a slice of dimension 0 lie together, so that reading it costs no more than its share."""
        ...

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        ...

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim."""
        ...


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
        """One tensor whose rows are needed once, in order: as from `read`, or as Rows, to save memory."""
        ...

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of dimension dim; other bytes are not read if the format allows it."""
        ...

    def read_box(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within bounds of every dimension; other bytes are not read if the format allows it."""
        ...


def check_entries(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorEntry]) -> None:
    """Compare the tensors of a file with those that its configuration implies.

    Args:
        expected: name -> shape.
        found: name -> what the file holds.

    Raises:
        CheckpointError: they differ; the message names every kind of difference, with five tensors of each.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} tensors are missing: {name_some(missing)}")
    if extra := [name for name in found if name not in expected]:
        problems.append(f"{len(extra)} tensors do not belong to it: {name_some(extra)}")
    if misshapen := [
        f"{name} (found {list(found[name].shape)}, expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]:
        problems.append(f"{len(misshapen)} tensors have the wrong shape: {name_some(misshapen)}")
    if not_float := [f"{name} ({entry.dtype})" for name, entry in found.items() if not entry.dtype.is_floating_point]:
        problems.append(
            f"{len(not_float)} tensors are no floating-point numbers (a quantised checkpoint?): {name_some(not_float)}"
        )
    if problems:
        raise CheckpointError("the weights are not those of its configuration: " + "; ".join(problems))
