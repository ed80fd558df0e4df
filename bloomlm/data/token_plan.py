"""Batches whose size is a number of tokens: which places they have for examples of which lengths."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CLASS_TOKENS = 16
"""For a TokenPlan, lengths are rounded up to a multiple of this; a batch wastes less than this for each example."""

Indices = npt.NDArray[np.int64]


class TokenPlan:
    """The places for examples in the batches of an epoch, where the size of a batch is a number of tokens.

    The plan is made once and depends on the lengths alone. Lengths are rounded up to classes; each batch takes as many
    examples of the largest class as fit, then of the next class. An epoch assigns its shuffled examples to the places
    of their classes and shuffles the batches. So every epoch has the same number of equally full batches, each with a
    new mix of examples.

    Args:
        lengths: number of tokens of each example, at least 1.
        max_tokens: maximum number of tokens of a batch.
    """

    def __init__(self, lengths: Sequence[int] | Indices, max_tokens: int) -> None:
        rounded = -(-np.asarray(lengths, dtype=np.int64) // CLASS_TOKENS) * CLASS_TOKENS
        # the classes, largest first, and the class of each example
        sizes, self._class_of = np.unique(-rounded, return_inverse=True)
        takes, repeats = _fill(-sizes, np.bincount(self._class_of), max_tokens)
        rows = np.repeat(takes, repeats, axis=0)  # [batches, classes]
        self._place_classes = np.repeat(np.tile(np.arange(len(sizes)), len(rows)), rows.ravel())
        self._batch_sizes = rows.sum(axis=1)

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return len(self._batch_sizes)

    def deal(self, order: Indices, batch_order: Indices) -> tuple[Indices, Indices]:
        """Assign the shuffled examples and batches of an epoch: the examples batch by batch, and each batch's end."""
        places = np.argsort(self._place_classes, kind="stable")
        dealt = np.empty_like(order)
        dealt[places] = order[np.argsort(self._class_of[order], kind="stable")]
        batches = np.split(dealt, np.cumsum(self._batch_sizes)[:-1])
        return np.concatenate([batches[number] for number in batch_order]), np.cumsum(self._batch_sizes[batch_order])


def _fill(sizes: Indices, counts: Indices, max_tokens: int) -> tuple[Indices, Indices]:
    """How many examples of each class a batch takes, [patterns, classes], and how often each pattern occurs."""
    left = counts.copy()
    takes, repeats = [], []
    while left.any():
        take = np.zeros_like(left)
        room = max_tokens
        for index, size in enumerate(sizes):
            take[index] = min(left[index], room // size)
            room -= take[index] * size
        if not take.any():
            take[np.flatnonzero(left)[0]] = 1  # an example that is longer than a whole batch
        taken = take > 0
        times = int((left[taken] // take[taken]).min())
        left -= take * times
        takes.append(take)
        repeats.append(times)
    return np.stack(takes), np.array(repeats)
