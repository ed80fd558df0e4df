"""Copies of a model share the work: each takes every n-th piece, and in the end all have all results."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from bloomlm.errors import ConfigError
from bloomlm.parallel.mesh import Mesh

T = TypeVar("T")


def own_share(pieces: Sequence[T], mesh: Mesh) -> list[T]:
    """The pieces of this rank's copy; sorted by size, every copy gets about as much work as the others."""
    return list(pieces[mesh.dp_rank :: mesh.degrees.dp])


def join_shares(own: dict[int, T], mesh: Mesh) -> dict[int, T]:
    """The results of all copies by number; every rank must come here."""
    return {number: result for share in mesh.gather_copies(own) for number, result in share.items()}


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # what PyTorch's CPU allocator says has no class of its own
    message = str(error).lower()
    return any(words in message for words in ("not enough memory", "can't allocate memory", "out of memory"))


def free_memory(size: str, mesh: Mesh, error: Exception) -> None:
    """Make room for a smaller batch after memory ran out.

    Args:
        size: of the batch, in words.
        mesh: the ranks.
        error: that said so.

    Raises:
        ConfigError: ranks compute the batch together, and the others are in the middle of it.
    """
    if mesh.degrees.tp > 1:
        raise ConfigError(
            f"memory ran out on {size}; ranks that share a model cannot make batches smaller on the way. Give a "
            f"smaller --batch_size ({error})"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
