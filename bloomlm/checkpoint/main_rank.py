"""What the main rank does for all, such as creating a directory for them; its errors are raised on every rank."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from bloomlm.errors import CheckpointError
from bloomlm.parallel.mesh import Mesh

T = TypeVar("T")


@contextmanager
def one_directory(context: AbstractContextManager[Path], mesh: Mesh) -> Iterator[Path]:
    """Enter a context that yields a directory (atomic_directory, ...) on the main rank, and give its path to all ranks.

    The context ends when every rank is done, with an error if any rank had one; no rank continues before that.

    Args:
        context: used on the main rank only.
        mesh: the ranks, all of which must call this.

    Raises:
        CheckpointError: the error of another rank; errors of this rank are raised unchanged.
    """
    if mesh.is_alone:
        with context as directory:
            yield directory
        return
    error: Exception | None = None
    stack = ExitStack()
    place: list[Path | None] = [None]
    try:
        if mesh.is_main:
            place = [stack.enter_context(context)]
    except Exception as problem:
        error = problem
    fail_together(error, mesh)
    dist.broadcast_object_list(place, src=0)
    path = place[0]
    assert path is not None
    try:
        with stack, failing_together(mesh):
            yield path
    except Exception as problem:
        error = problem
    fail_together(error, mesh)


@contextmanager
def failing_together(mesh: Mesh) -> Iterator[None]:
    """At the end of the block, raise an error on every rank if one of them had one; no rank continues before that.

    Args:
        mesh: the ranks, all of which must enter the block.

    Raises:
        CheckpointError: the error of another rank; errors of this rank are raised unchanged.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as problem:
        error = problem
    fail_together(error, mesh)


def fail_together(error: Exception | None, mesh: Mesh) -> None:
    """Raise an error on every rank if one of them has one.

    Args:
        error: the error of this rank, if any.
        mesh: the ranks, all of which must call this.

    Raises:
        CheckpointError: the error of another rank; that of this rank is raised unchanged.
    """
    if not mesh.is_alone:
        found: list[str | None] = [None] * mesh.degrees.world_size
        dist.all_gather_object(found, None if error is None else str(error))
        failed = next(((rank, text) for rank, text in enumerate(found) if text is not None), None)
        if error is None and failed is not None:
            raise CheckpointError(f"rank {failed[0]}: {failed[1]}")
    if error is not None:
        raise error


def on_main(action: Callable[[], T], mesh: Mesh) -> T:
    """Do something on the main rank alone and return its result on every rank; its error is raised on every rank.

    Raises:
        CheckpointError: the error of the main rank, which raises it unchanged.
    """
    found: list[Any] = [None]
    error: Exception | None = None
    if mesh.is_main:
        try:
            found = [action()]
        except Exception as problem:
            error = problem
    fail_together(error, mesh)
    if not mesh.is_alone:
        dist.broadcast_object_list(found, src=0)
    result: T = found[0]
    return result


def main_first(action: Callable[[], T], mesh: Mesh) -> T:
    """Do the same on every rank, first on the main rank, so that the others find the files that it has written.

    Raises:
        CheckpointError: the error of another rank; errors of this rank are raised unchanged.
    """
    results: list[T] = []
    for turn in (True, False):
        error: Exception | None = None
        if mesh.is_main is turn:
            try:
                results.append(action())
            except Exception as problem:
                error = problem
        fail_together(error, mesh)
    return results[0]
