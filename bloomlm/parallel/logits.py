"""The logits of a chunk of rows, or numbers of the same shape, as blocks of columns.

On a CPU the memory of a larger tensor comes from the system, is cleared, and goes back each time (allocator.py), which
would take a third as long as the product that writes it. Blocks lie in the holes that activations have left in the
heap, and stay in the cache of the processor while their exponentials are summed.

Shapes: C rows of a chunk, V vocabulary (this rank's part of it, where it is shared).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_BYTES = 4 * 2**20
_UNIT = 4096  # columns; products of fewer are slower


def block_columns(num_rows: int, itemsize: int) -> int:
    """The number of columns of a block of so many rows."""
    return max(1, _MOST_BYTES // max(1, num_rows * itemsize * _UNIT)) * _UNIT


@dataclass(frozen=True)
class Logits:
    """Blocks [C, columns], side by side."""

    blocks: tuple[Tensor, ...]
    """All of the same number of columns, except the last, which may have fewer."""

    @property
    def whole(self) -> Tensor:
        """[C, V], where there is one block."""
        (block,) = self.blocks
        return block

    def with_tokens(self) -> Iterator[tuple[slice, Tensor]]:
        """Each block after its columns."""
        start = 0
        for block in self.blocks:
            yield slice(start, start + block.shape[1]), block
            start += block.shape[1]

    def of(self, tokens: slice) -> Tensor:
        """[C, tokens]: some columns, a view where they lie in one block."""
        parts = []
        for place, block in self.with_tokens():
            start, stop = max(tokens.start, place.start), min(tokens.stop, place.stop)
            if start < stop:
                parts.append(block[:, start - place.start : stop - place.start])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def row_max(self) -> Tensor:
        """[C, 1]: the largest number of each row."""
        return torch.cat([block.amax(dim=1, keepdim=True) for block in self.blocks], dim=1).amax(dim=1, keepdim=True)

    def row_sum(self) -> Tensor:
        """[C, 1]: the sum of each row."""
        return torch.cat([block.sum(dim=1, keepdim=True) for block in self.blocks], dim=1).sum(dim=1, keepdim=True)

    def subtract(self, values: Tensor) -> None:
        """Subtract a value [C, 1] from each row."""
        for block in self.blocks:
            block.sub_(values)

    def exp(self) -> None:
        """Replace z by exp(z)."""
        for block in self.blocks:
            block.exp_()

    def exp_and_sum(self, row_max: Tensor) -> Tensor:
        """Replace z by exp(z - row_max) and return the sum of each row, [C, 1]."""
        sums = [block.sub_(row_max).exp_().sum(dim=1, keepdim=True) for block in self.blocks]
        return torch.cat(sums, dim=1).sum(dim=1, keepdim=True)

    def pick(self, column: Tensor) -> Tensor:
        """[C, 1]: the element of each row in its column [C, 1]."""
        if len(self.blocks) == 1:
            return self.whole.gather(1, column)
        picked = self.blocks[0].new_empty(column.shape)
        for rows, columns, block in self._with_places(column):
            picked[rows, 0] = block[rows, columns]
        return picked

    def add(self, column: Tensor, values: Tensor) -> None:
        """Add a value [C, 1] to the element of each row in its column [C, 1]."""
        if len(self.blocks) == 1:
            self.whole.scatter_add_(1, column, values)
            return
        for rows, columns, block in self._with_places(column):
            block[rows, columns] += values[rows, 0]

    def _with_places(self, column: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, their columns within the block, and the block."""
        for tokens, block in self.with_tokens():
            rows = ((column >= tokens.start) & (column < tokens.stop)).squeeze(1).nonzero().squeeze(1)
            yield rows, column[rows, 0] - tokens.start, block
