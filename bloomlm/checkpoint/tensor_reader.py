"""What every file format offers: named tensors, read one at a time, whole or in part.

Each format (huggingface.py, ...) translates its names, layouts and files into this interface, and reader.py builds
models from it without knowing the format.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bloomlm.errors import CheckpointError, name_some
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.linear import Linear
from bloomlm.parallel.layout import Bounds

MIN_HUGE_BYTES = 32 * 2**20
"""Smaller pieces of memory come from malloc, which keeps them for the next one (allocator.py)."""


@dataclass(frozen=True)
class TensorEntry:
    """Shape and dtype of a stored tensor, known before it is read."""

    shape: tuple[int, ...]
    """Shape in the published orientation: a linear's weight is (out, in)."""
    dtype: torch.dtype
    """Dtype in the file."""


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows are read on demand, some at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    """(start, stop) -> rows start to stop."""

    def split(self, num_rows: int) -> Iterator[Tensor]:
        """All rows in order, in blocks of num_rows."""
        for start in range(0, self.shape[0], num_rows):
            yield self.read_rows(start, min(start + num_rows, self.shape[0]))


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    """Shape of the tensor that `read` returns."""
    dtype: torch.dtype
    """Dtype in the file."""
    read: Callable[[], Tensor]
    """Reads the whole tensor."""
    read_slice: Callable[[int, int, int], Tensor]
    """(dim, start, stop) -> entries start to stop of dimension dim."""
    has_rows_together: bool = False
    """Whether the bytes of a slice of dimension 0 are contiguous, so that no others are read for it."""


class TensorReader(Protocol):
    """The tensors of a checkpoint under their published names ("transformer.h.0.input_layernorm.weight")."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every parameter of the checkpoint; reading this reads no tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; where the format allows it, a private mapping of the file and not a copy."""
        ...

    def open(self, name: str) -> Tensor | Rows:
        """One tensor whose rows are needed once, in order: as from `read`, or as Rows where that saves memory."""
        ...

    def read_box(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within bounds of every dimension; other bytes are not read if the format allows it."""
        ...


def fresh_memory(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 with undefined contents, aligned for every dtype; returned to the system when it is freed.

    Large pieces are in huge pages where the system has them: it clears each page before use, which in pages of 4 KiB
    takes longer than reading the bytes from a fast disk.
    Source: transparent huge pages, https://docs.kernel.org/admin-guide/mm/transhuge.html.
    """
    if num_bytes < MIN_HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def empty_model(
    config: BloomConfig, dtype: torch.dtype = torch.float32, linear_dtype: torch.dtype | None = None
) -> BloomForCausalLM:
    """A model on the meta device: names, shapes and precisions of its parameters, without numbers.

    Args:
        config: its sizes.
        dtype: precision of the parameters.
        linear_dtype: precision of the weights of linear layers, where it differs from dtype.
    """
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    # Module.to would swap the contents of parameters, which those of fake tensors cannot
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            is_linear = isinstance(module, Linear) and name == "weight"
            setattr(module, name, nn.Parameter(parameter.to(linear_dtype if is_linear and linear_dtype else dtype)))
    return model


def check_entries(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorEntry]) -> None:
    """Compare the tensors of a file with those that its configuration implies.

    Args:
        expected: name -> shape.
        found: name -> shape and dtype in the file.

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
            f"{len(not_float)} tensors hold integers (is it a quantised checkpoint?): {name_some(not_float)}"
        )
    if problems:
        raise CheckpointError("the weights do not match the configuration: " + "; ".join(problems))
