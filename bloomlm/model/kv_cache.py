"""Keys and values of earlier tokens, and the plan of a forward pass that appends tokens to some rows.

Keys and values are kept with their position columns (alibi.COLUMNS), ready for the attention kernel. The position of a
row's first token is 0; virtual tokens have positions below 0.

Shapes: L blocks, R rows, M slots of a row, N packed new tokens, T new tokens of a row, H heads, K head_dim, C position
columns, E = K + C, P virtual tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from bloomlm.model.alibi import COLUMNS, head_slopes, query_columns
from bloomlm.model.config import BloomConfig
from bloomlm.row_memory import RowMemory

_MOST_PADDED = 2.0
"""The most slots that one masked kernel call reads for each slot in use. With 8 rows of 110 to 160 tokens a masked call
takes as long as a call without a mask, and separate calls for each row take a quarter longer."""


class KVCache(RowMemory):
    """Keys and values of R sequences."""

    def __init__(
        self,
        config: BloomConfig,
        num_rows: int,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        heads: range | None = None,
        num_virtual: int = 0,
        spare_virtual: int = 0,
    ) -> None:
        """Reserve room for 2 * L * R * M * H * E elements.

        Args:
            config: the model's shape.
            num_rows: the number of sequences that the cache can hold at once (R).
            num_tokens: the most tokens of a sequence, without virtual tokens.
            dtype: precision of the keys and values.
            device: where they are.
            heads: the heads that are computed here (H of them); None: all of the model's heads.
            num_virtual: number of virtual tokens that the model puts before every sequence (P).
            spare_virtual: more slots, for rows that get virtual tokens of their own.
        """
        heads = heads or range(config.n_head)
        super().__init__(
            num_blocks=config.n_layer,
            num_rows=num_rows,
            num_heads=len(heads),
            num_slots=num_virtual + spare_virtual + num_tokens,
            width=config.head_dim + COLUMNS,
            dtype=dtype,
            device=device,
            num_virtual=num_virtual,
        )
        self.keys, self.values = self.tensor[:, 0], self.tensor[:, 1]
        all_slopes = head_slopes(config.n_head)
        self.slopes = torch.tensor([all_slopes[head] for head in heads], device=device)
        """[H] slopes of ALiBi of the heads that are computed here."""
        self.query_columns = query_columns(self.slopes, config.head_dim)
        """[H, C] position columns of every query."""

    def extend(self, rows: Sequence[int], num_new: Sequence[int]) -> "Extension":
        """Prepare a forward pass that appends tokens to rows.

        Args:
            rows: different rows, in the order of the documents.
            num_new: number of tokens of each document, at least 1.

        Raises:
            ValueError: a row has too few free slots.
        """
        return Extension(self, rows, num_new)


@dataclass(frozen=True, eq=False)
class CachedCall:
    """A kernel call: the new tokens of neighbouring rows of equal length, or one new token of rows in a span."""

    tokens: slice | Tensor
    """The call's part of the N new tokens; in a span, their places among the N."""
    rows: slice
    """Rows of the cache that the kernel reads."""
    num_slots: int
    """Number of slots that it reads of each row."""
    places: Tensor | None = None
    """In a span, the place of each token's row. Other rows there may hold anything; their results are dropped."""
    visible: Tensor | None = None
    """Where a new token may look: [T, num_slots] bool, in a span [rows, 1, 1, num_slots]; None: everywhere."""


class Extension:
    """New tokens of some rows: the slots that they go to and the slots that they attend to, the same in every block."""

    def __init__(self, cache: KVCache, rows: Sequence[int], num_new: Sequence[int]) -> None:
        self.cache = cache
        self.rows = tuple(rows)
        self.free_rows = [row for row in rows if cache.lengths[row] == 0]
        """Rows that hold nothing yet, so that virtual tokens must be written before their first tokens."""
        self.is_prefill = len(self.free_rows) == len(self.rows)
        """Whether all rows are free, so that attention needs nothing from the cache."""
        self.is_decode = not self.is_prefill and all(count == 1 for count in num_new)
        """Whether every row is in use and gets one token."""
        slots = [cache.claim(row, count) for row, count in zip(rows, num_new, strict=True)]
        self._claimed = slots
        device = cache.keys.device
        self.slots = torch.tensor([slot for new in slots for slot in new], device=device)
        """[N] slot of each new token."""
        positions = [slot - cache.num_virtual[row] for row, new in zip(rows, slots, strict=True) for slot in new]
        self.positions = torch.tensor(positions, device=device)
        """[N] position of each new token within its sequence."""
        self._blocks = list(_equal_neighbours(rows, slots))
        self._block = (slice(rows[0], rows[0] + len(rows)), slice(slots[0].start, slots[0].stop))
        self._is_block = len(self._blocks) == 1
        token_rows = [row for row, new in zip(rows, slots, strict=True) for _ in new]
        self.token_rows = torch.tensor(token_rows, device=device)
        """[N] row of each new token."""

    @cached_property
    def calls(self) -> list[CachedCall]:
        """The kernel calls, unless this is a prefill."""
        return _plan_calls(self.rows, self._claimed, self._blocks, self.slots.device)

    def write(self, layer: int, fused: Tensor, virtual: tuple[Tensor, Tensor] | None) -> None:
        """Write the new keys and values of one block into the cache, which carries no gradients.

        Args:
            layer: index of the block.
            fused: [N, H, 3, E] queries, keys and values of the new tokens.
            virtual: keys and values [H, P, E], which are written into rows that were free.
        """
        for part, memory in ((1, self.cache.keys[layer]), (2, self.cache.values[layer])):
            new = fused[:, :, part].detach()
            if self._is_block:
                rows, slots = self._block
                memory[rows, :, slots] = new.unflatten(0, (len(self.rows), -1)).transpose(1, 2)
            else:
                memory[self.token_rows, :, self.slots] = new
            if virtual is not None:
                for row in self.free_rows:
                    memory[row, :, : self.cache.num_virtual[row]] = virtual[part - 1].detach()

    def commit(self) -> None:
        """Count the new tokens, after every block has written them."""
        for row, new in zip(self.rows, self._claimed, strict=True):
            self.cache.lengths[row] = new.stop


def _equal_neighbours(rows: Sequence[int], slots: Sequence[range]) -> Iterator[range]:
    """Runs of documents with the same slots in neighbouring rows."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1 or slots[i] != slots[first]:
            yield range(first, i)
            first = i


def _plan_calls(
    rows: Sequence[int], slots: Sequence[range], blocks: Sequence[range], device: torch.device
) -> list[CachedCall]:
    """Kernel calls for documents that attend to their rows, so that few calls read few slots that are not in use."""
    starts = [0, *accumulate(map(len, slots))]
    calls = []
    singles: list[int] = []
    for block in blocks:
        if len(blocks) > 1 and len(slots[block.start]) == 1:
            singles += block
            continue
        tokens = slice(starts[block.start], starts[block.stop])
        span, new = slice(rows[block.start], rows[block.stop - 1] + 1), slots[block.start]
        order = torch.arange(new.stop, device=device)
        visible = order <= order[new.start :, None] if len(new) > 1 else None
        calls.append(CachedCall(tokens, span, new.stop, visible=visible))
    for group in _spans(sorted((rows[i], slots[i].stop, starts[i]) for i in singles)):
        first, longest = group[0][0], max(stop for _, stop, _ in group)
        places = torch.tensor([row - first for row, *_ in group], device=device)
        stops = torch.ones(group[-1][0] - first + 1, dtype=torch.int64, device=device)
        stops[places] = torch.tensor([stop for _, stop, _ in group], device=device)
        visible = torch.arange(longest, device=device) < stops[:, None]
        places_among_new = torch.tensor([token for *_, token in group], device=device)
        span = slice(first, first + len(stops))
        calls.append(CachedCall(places_among_new, span, longest, places, visible[:, None, None]))
    return calls


def _spans(rows: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Group rows, given as (row, slots in use, token) in order, so that a call for a group reads few unused slots."""
    spans: list[list[tuple[int, int, int]]] = []
    num_used = longest = 0
    for row, stop, token in rows:
        num_used, longest = num_used + stop, max(longest, stop)
        if spans and (row - spans[-1][0][0] + 1) * longest <= _MOST_PADDED * num_used:
            spans[-1].append((row, stop, token))
        else:
            spans.append([(row, stop, token)])
            num_used = longest = stop
    return spans
