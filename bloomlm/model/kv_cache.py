"""Keys and values of earlier tokens, in rows of memory that is allocated once. Every row has its own length.

A row holds [virtual tokens][tokens] from its first slot on. Rows are filled, copied and freed one by one, and a row
stays in its place when others change. Keys and values are kept with their position columns (alibi.COLUMNS), ready for
the attention kernel.

Shapes: L blocks, R rows, M slots of a row, N packed new tokens, H heads, K head_dim, C position columns, E = K + C,
P virtual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomlm.model.alibi import COLUMNS
from bloomlm.model.config import BloomConfig

_MOST_PADDED = 2.0
"""The most slots that one masked kernel call reads for each slot in use. With 8 rows of 110 to 160 tokens a masked call
takes as long as a call without a mask, and separate calls for each row take a quarter longer."""


class KVCache:
    """Keys and values of R sequences."""

    def __init__(
        self,
        config: BloomConfig,
        num_rows: int,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        n_head: int | None = None,
        num_virtual: int = 0,
    ) -> None:
        """Reserve room for 2 * L * R * M * H * E elements. A row takes memory on a CPU from its first use on.

        Args:
            config: the model's shape.
            num_rows: the number of sequences that the cache can hold at once (R).
            num_tokens: the most tokens of a sequence, without virtual tokens: M is num_virtual + num_tokens.
            dtype: precision of the keys and values.
            device: where they are.
            n_head: number of heads that are computed here (H); None: all of the model's heads.
            num_virtual: number of virtual tokens before every sequence (P).
        """
        slots = num_virtual + num_tokens
        shape = (config.n_layer, num_rows, n_head or config.n_head, slots, config.head_dim + COLUMNS)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.num_virtual = num_virtual
        self.lengths = [0] * num_rows
        """Number of slots that each row uses, including virtual tokens; 0: the row is free."""
        self._dirty = [slots] * num_rows  # slots of each row that may hold anything; the slots behind them hold zeros

    def extend(self, rows: Sequence[int], num_new: Sequence[int]) -> "Extension":
        """Prepare a forward pass that appends tokens to rows.

        Args:
            rows: different rows, in the order of the documents.
            num_new: number of tokens of each document, at least 1.

        Raises:
            ValueError: a row has too few free slots.
        """
        return Extension(self, rows, num_new)

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        used = self.lengths[source]
        self.free(target)
        self.claim(target, used)
        self.keys[:, target, :, :used] = self.keys[:, source, :, :used]
        self.values[:, target, :, :used] = self.values[:, source, :, :used]
        self.lengths[target] = used

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        self.lengths[row] = 0

    def claim(self, row: int, num_slots: int) -> None:
        """Prepare a row for writing its first num_slots slots.

        In a free row the slots behind them become zeros. Attention multiplies the values of masked slots by 0, and
        0 * NaN would be NaN.
        """
        if self.lengths[row] == 0:
            self.keys[:, row, :, num_slots : self._dirty[row]] = 0
            self.values[:, row, :, num_slots : self._dirty[row]] = 0
            self._dirty[row] = num_slots
        self._dirty[row] = max(self._dirty[row], num_slots)


@dataclass(frozen=True, eq=False)
class CachedCall:
    """A kernel call for the new tokens of one row, or of neighbouring rows of equal length."""

    tokens: slice
    """The call's part of the N new tokens."""
    rows: slice
    """Rows of the cache."""
    num_slots: int
    """Number of slots that the kernel reads of each row."""
    mask: Tensor | None
    """[T, num_slots] bool, True where a new token may look; None: everywhere."""


class Extension:
    """New tokens of some rows: the slots that they go to and the slots that they attend to, the same in every block."""

    def __init__(self, cache: KVCache, rows: Sequence[int], num_new: Sequence[int]) -> None:
        self.cache = cache
        self.rows = tuple(rows)
        self.free_rows = [row for row in rows if cache.lengths[row] == 0]
        """Rows that hold nothing yet, so that virtual tokens must be written before their first tokens."""
        self.is_prefill = len(self.free_rows) == len(self.rows)
        """Whether all rows are free, so that attention needs nothing from the cache."""
        starts = [cache.lengths[row] or cache.num_virtual for row in rows]
        self._stops = [start + count for start, count in zip(starts, num_new, strict=True)]
        max_slots = cache.keys.shape[3]
        for row, count, stop in zip(rows, num_new, self._stops, strict=True):
            if stop > max_slots:
                raise ValueError(
                    f"{count} more tokens do not fit into a row of {max_slots} slots, {cache.lengths[row]} in use"
                )
        for row, stop in zip(rows, self._stops, strict=True):
            cache.claim(row, stop)
        device = cache.keys.device
        slots = [torch.arange(*bounds) for bounds in zip(starts, self._stops, strict=True)]
        self._slots = torch.cat(slots).to(device)
        self.positions = self._slots - cache.num_virtual
        """[N] position of each new token within its sequence."""
        first, count = rows[0], len(rows)
        self._is_block = (
            self.rows == tuple(range(first, first + count)) and len(set(starts)) == 1 and len(set(num_new)) == 1
        )
        self._block = (slice(first, first + count), slice(starts[0], self._stops[0]))
        if not self._is_block:
            self._token_rows = torch.tensor(rows, device=device).repeat_interleave(
                torch.tensor(num_new, device=device), output_size=len(self._slots)
            )
        self.calls: list[CachedCall] = []
        """The kernel calls, where there is no masked call for all rows."""
        self.masked: tuple[slice, int, Tensor, Tensor] | None = None
        """One masked call, where every row has one new token: the span of rows that it reads, the number of slots of
        each, the place of each token's row in that span [N], and where a row's token may look [rows, 1, 1, slots]
        bool. Other rows in the span may hold anything, because their results are dropped."""
        if not self.is_prefill:
            self._plan_calls(starts, num_new, device)

    def write(self, layer: int, fused: Tensor, virtual: tuple[Tensor, Tensor] | None) -> None:
        """Write the new keys and values of one block into the cache.

        Args:
            layer: index of the block.
            fused: [N, H, 3, E] queries, keys and values of the new tokens.
            virtual: keys and values [H, P, E], which are written into rows that were free.
        """
        for part, memory in ((1, self.cache.keys[layer]), (2, self.cache.values[layer])):
            new = fused[:, :, part]
            if self._is_block:
                rows, slots = self._block
                memory[rows, :, slots] = new.unflatten(0, (len(self.rows), -1)).transpose(1, 2)
            else:
                memory[self._token_rows, :, self._slots] = new
            if virtual is not None:
                for row in self.free_rows:
                    memory[row, :, : self.cache.num_virtual] = virtual[part - 1]

    def commit(self) -> None:
        """Count the new tokens, after every block has written them."""
        for row, stop in zip(self.rows, self._stops, strict=True):
            self.cache.lengths[row] = stop

    def _plan_calls(self, starts: Sequence[int], num_new: Sequence[int], device: torch.device) -> None:
        if self._is_block:
            mask = _causal(starts[0], num_new[0], device)
            self.calls.append(CachedCall(slice(0, sum(num_new)), self._block[0], self._stops[0], mask))
            return
        span = slice(min(self.rows), max(self.rows) + 1)
        longest = max(self._stops)
        if max(num_new) == 1 and (span.stop - span.start) * longest <= _MOST_PADDED * sum(self._stops):
            places = torch.tensor(self.rows, device=device) - span.start
            lengths = torch.ones(span.stop - span.start, dtype=torch.int64, device=device)
            lengths[places] = torch.tensor(self._stops, device=device)
            visible = torch.arange(longest, device=device) < lengths[:, None]
            self.masked = (span, longest, places, visible[:, None, None])
            return
        first = 0
        for row, start, count in zip(self.rows, starts, num_new, strict=True):
            mask = _causal(start, count, device)
            self.calls.append(CachedCall(slice(first, first + count), slice(row, row + 1), start + count, mask))
            first += count


def _causal(start: int, num_new: int, device: torch.device) -> Tensor | None:
    """[T, start + T] bool; None for one token, which sees all slots."""
    if num_new == 1:
        return None
    return torch.arange(start + num_new, device=device) <= torch.arange(start, start + num_new, device=device)[:, None]
