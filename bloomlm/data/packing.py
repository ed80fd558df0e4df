"""Which examples share a batch where a batch is a budget of tokens, not a number of examples.

The plan is made once, from the lengths alone: lengths are rounded up to classes, and each batch takes as many of the
largest class as fit, then of the next. An epoch deals its shuffled examples out to the places of their class and
shuffles the batches. So every epoch has the same number of batches, filled alike, and a new mix of examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

CLASS_TOKENS = 16
"""Lengths are rounded up to a multiple of this; a batch stays that much below its budget for each example at most."""


@dataclass(frozen=True)
class TokenBudget:
    """The size of a batch as tokens."""

    max_tokens: int
    """A batch holds so many or fewer; an example that is longer than that is a batch of its own."""


class TokenPlan:
    """Places of a whole epoch.

    Args:
        lengths: tokens of each example, each at least 1.
        max_tokens: of a batch.
    """

    def __init__(self, lengths: Sequence[int] | Indices, max_tokens: int) -> None:
        rounded = -(-np.asarray(lengths, dtype=np.int64) // CLASS_TOKENS) * CLASS_TOKENS
        # the classes, the largest first, and which one each example is in
        sizes, self._class_of = np.unique(-rounded, return_inverse=True)
        counts = np.bincount(self._class_of)
        takes, repeats = _fill(-sizes, counts, max_tokens)
        rows = np.repeat(takes, repeats, axis=0)  # [batches, classes]
        self._place_classes = np.repeat(np.tile(np.arange(len(sizes)), len(rows)), rows.ravel())
        self._batch_sizes = rows.sum(axis=1)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._batch_sizes)

    def deal(self, order: Indices, batch_order: Indices) -> tuple[Indices, Indices]:
        """An epoch.

        Args:
            order: the examples as shuffled.
            batch_order: the batches as shuffled.

        Returns:
            The examples in the order of their batches, and where each batch ends.
        """
        places = np.argsort(self._place_classes, kind="stable")
        dealt = np.empty_like(order)
        dealt[places] = order[np.argsort(self._class_of[order], kind="stable")]
        batches = np.split(dealt, np.cumsum(self._batch_sizes)[:-1])
        return np.concatenate([batches[number] for number in batch_order]), np.cumsum(self._batch_sizes[batch_order])


def _fill(sizes: Indices, counts: Indices, max_tokens: int) -> tuple[Indices, Indices]:
    """How many of each class go into a batch, [patterns, classes], and how often each pattern occurs."""
    left = counts.copy()
    takes, repeats = [], []
    while left.any():
        take = np.zeros_like(left)
        room = max_tokens
        for index, size in enumerate(sizes):
            take[index] = min(left[index], room // size)
            room -= take[index] * size
        if not take.any():
            take[np.flatnonzero(left)[0]] = 1  # longer than a whole batch
        taken = take > 0
        times = int((left[taken] // take[taken]).min())
        left -= take * times
        takes.append(take)
        repeats.append(times)
    return np.stack(takes), np.array(repeats)
