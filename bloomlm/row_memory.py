"""Memory for the keys and values of many sequences, one in each row, whatever model computes them.

On a CPU all rows are one mapping of addresses without memory behind them. The system adds a page when it is first
written, and `free` gives a row's pages back, so rows can be many and long, and cost what is in them: demand paging
instead of tables of blocks (the idea is vAttention's, https://arxiv.org/abs/2405.04437). A kernel finds a row's slots
side by side. On other devices the memory is an ordinary tensor.

Shapes: L blocks, R rows, H heads, M slots of a row, E width of a key, P virtual tokens, T tokens.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MAP_NORESERVE = 0x4000
"""Linux's value on x86 and ARM, from <asm-generic/mman.h>: addresses do not count as memory that the process will
use. Python 3.11 has no name for it."""
_HAS_PAGING = hasattr(mmap, "MADV_NOHUGEPAGE")
"""Linux only. With huge pages, the first token of a row would take 2 MiB for each head."""


@dataclass(frozen=True, kw_only=True)
class RowFeatures:
    """What the rows of a model can do beyond reading, continuing, copying and freeing; see ModelRows."""

    scores_chunks: bool = False
    """prefill gives the logits of more than the last position."""
    truncates: bool = False
    """truncate."""
    blocks: bool = False
    """read_block and write_blocks."""
    adapters: bool = False
    """set_adapter."""
    paged: bool = False
    """Rows take memory only for the tokens that are in them."""


def is_paged(device: torch.device | str) -> bool:
    """Whether a RowMemory takes memory only for the tokens that are in it, as it does on Linux's CPUs."""
    return _HAS_PAGING and torch.device(device).type == "cpu"


class RowMemory:
    """Keys and values of R sequences. A row holds [virtual tokens][tokens] from its first slot on, then zeros.

    The zeros matter: attention multiplies the values of masked slots by 0, and 0 * NaN would be NaN.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        num_rows: int,
        num_heads: int,
        num_slots: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        num_virtual: int = 0,
    ) -> None:
        """Reserve room.

        Args:
            num_blocks, num_rows, num_heads, num_slots, width: L, R, H, M and E.
            dtype: precision of the keys and values.
            device: where they are.
            num_virtual: slots that are kept for virtual tokens in a free row; write_virtual may change their number.

        Raises:
            MemoryError: the system refuses so many addresses.
        """
        shape = (num_blocks, 2, num_rows, num_heads, num_slots, width)
        self._mapping: mmap.mmap | None = None
        if is_paged(device) and 0 not in shape:
            self._mapping, self.tensor = _map(shape, dtype)
        else:
            # an inference tensor could not be changed outside inference mode, where rows are freed
            with torch.inference_mode(False):
                self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        """[L, 2, R, H, M, E]: the keys and the values of each block."""
        self.lengths = [0] * num_rows
        """Number of slots that each row uses, including virtual tokens; 0: the row is free."""
        self.num_virtual = [num_virtual] * num_rows
        """Number of virtual tokens of each row."""
        self._free_virtual = num_virtual
        self._written = [0] * num_rows
        """Number of slots of each row that may hold anything; the slots behind them hold zeros."""

    def claim(self, row: int, num_new: int) -> range:
        """The slots of a row's next tokens, which may then be written.

        Raises:
            ValueError: the row has too few free slots.
        """
        start = self.lengths[row] or self.num_virtual[row]
        num_slots = self.tensor.shape[4]
        if start + num_new > num_slots:
            raise ValueError(
                f"{num_new} more tokens do not fit into a row of {num_slots} slots, {self.lengths[row]} in use"
            )
        self._written[row] = max(self._written[row], start + num_new)
        return range(start, start + num_new)

    def write_virtual(self, row: int, virtual: Tensor) -> None:
        """Let a free row begin with virtual tokens.

        Args:
            row: a free row.
            virtual: [L, 2, H, P, E].

        Raises:
            ValueError: there are more virtual tokens than slots.
        """
        assert self.lengths[row] == 0, "virtual tokens come before all others"
        self.num_virtual[row] = 0
        slots = self.claim(row, virtual.shape[3])
        self.tensor[:, :, row, :, : slots.stop] = virtual
        self.num_virtual[row] = self.lengths[row] = slots.stop

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        self.free(target)
        used = self.lengths[source]
        self.tensor[:, :, target, :, :used] = self.tensor[:, :, source, :, :used]
        self._written[target] = self.lengths[target] = used
        self.num_virtual[target] = self.num_virtual[source]

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep a row's virtual tokens and its first num_tokens tokens.

        Raises:
            ValueError: it has fewer.
        """
        stop = self._slots(row, 0, num_tokens).stop
        if self.lengths[row]:
            self.tensor[:, :, row, :, stop : self._written[row]] = 0
            self._written[row] = self.lengths[row] = stop

    def free(self, row: int) -> None:
        """Let a row be used for another sequence, and return its memory."""
        if self._written[row]:
            self._clear(row)
        self._written[row] = self.lengths[row] = 0
        self.num_virtual[row] = self._free_virtual

    def read_block(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of the keys and values of tokens start .. stop, virtual tokens not counted: [L, 2, H, T, E].

        Raises:
            ValueError: the row has fewer tokens.
        """
        slots = self._slots(row, start, stop)
        return self.tensor[:, :, row, :, slots.start : slots.stop].clone()

    def write_blocks(self, row: int, blocks: Sequence[Tensor]) -> None:
        """Fill the first tokens of a row that has no tokens yet.

        Args:
            row: a free row, or one that has virtual tokens only.
            blocks: what read_block returned, in the order of the tokens.

        Raises:
            ValueError: they do not fit.
        """
        assert self.lengths[row] in (0, self.num_virtual[row]), "blocks come before all other tokens"
        for block in blocks:
            slots = self.claim(row, block.shape[3])
            self.tensor[:, :, row, :, slots.start : slots.stop] = block
            self.lengths[row] = slots.stop

    def _slots(self, row: int, start: int, stop: int) -> range:
        """The slots of some tokens that a row has."""
        first = self.num_virtual[row]
        num_tokens = max(self.lengths[row] - first, 0)
        if not 0 <= start <= stop <= num_tokens:
            raise ValueError(f"row {row} has {num_tokens} tokens; it has no tokens {start} to {stop}")
        return range(first + start, first + stop)

    def _clear(self, row: int) -> None:
        """Fill the row with zeros; on a CPU, its pages leave."""
        if self._mapping is None:
            self.tensor[:, :, row, :, : self._written[row]] = 0
            return
        page = mmap.PAGESIZE
        num_bytes = self.tensor[0, 0, row].nbytes
        everything = self.tensor.view(torch.uint8).flatten()
        for part in range(2 * len(self.tensor)):
            start = (part * len(self.lengths) + row) * num_bytes
            stop = start + num_bytes
            # the first and the last page may hold parts of neighbouring rows
            first, last = -(-start // page) * page, stop // page * page
            if first >= last:
                everything[start:stop] = 0
                continue
            everything[start:first] = 0
            everything[last:stop] = 0
            self._mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _map(shape: Sequence[int], dtype: torch.dtype) -> tuple[mmap.mmap, Tensor]:
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    try:
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise MemoryError(f"the system has no {num_bytes:,} bytes of addresses for keys and values: {error}") from error
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping, torch.frombuffer(mapping, dtype=dtype).view(*shape)
