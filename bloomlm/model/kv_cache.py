"""Keys and values of the tokens so far, in memory that is allocated once: one append, one length.

Rows are left-padded to one common length, so that every row's next token goes to the same slot. Keys and values are
kept with their position columns (alibi.COLUMNS), ready for the attention kernel.

Shapes: L blocks, B batch, T new tokens, S cached tokens, H heads, K head_dim.
"""

import torch
from torch import Tensor

from bloomlm.model.alibi import COLUMNS
from bloomlm.model.config import BloomConfig


class KVCache:
    """Cache of B rows and at most max_length tokens each, virtual tokens included."""

    def __init__(
        self,
        config: BloomConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        n_head: int | None = None,
    ) -> None:
        """Allocate the memory: 2 * L * B * max_length * H * (head_dim + 8) elements, H being n_head or the model's."""
        shape = (config.n_layer, batch_size, n_head or config.n_head, max_length, config.head_dim + COLUMNS)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        """Slots in use (S), the same in every row."""
        self.next_positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """[B] position of each row's next token."""
        self.real: Tensor | None = None
        """[B, max_length] bool, False at pads; None while no row has a pad."""

    @property
    def batch_size(self) -> int:
        """Number of rows (B)."""
        return len(self.next_positions)

    @property
    def max_length(self) -> int:
        """Slots of a row."""
        return self.keys.shape[3]

    def check_room(self, num_tokens: int) -> None:
        """Raise ValueError unless num_tokens more fit."""
        if self.length + num_tokens > self.max_length:
            raise ValueError(
                f"{num_tokens} more tokens do not fit a cache of {self.max_length} slots, {self.length} in use"
            )

    def append(self, layer: int, key: Tensor, value: Tensor, start: int | None = None) -> tuple[Tensor, Tensor]:
        """Write block `layer`'s T new keys and values after the present ones; `advance` then counts them.

        Args:
            layer: index of the block.
            key: [B, H, T, K + C] (B may be 1: the same for all rows).
            value: the same shape.
            start: slot of the first; by default the first unused one.

        Returns:
            Views of all keys and values so far, [B, H, S + T, K + C] each.
        """
        start = self.length if start is None else start
        stop = start + key.shape[2]
        self.keys[layer, :, :, start:stop] = key
        self.values[layer, :, :, start:stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, num_slots: int, num_tokens: Tensor | int, real: Tensor | None = None) -> None:
        """Count num_slots new slots.

        Args:
            num_slots: slots written in every block since the last call.
            num_tokens: how many of them are real tokens, by row [B] or for all alike.
            real: [B, num_slots] bool, False at pads, where there are pads.
        """
        if real is not None:
            self.real = torch.ones(self.batch_size, self.max_length, dtype=torch.bool, device=real.device)
            self.real[:, self.length : self.length + num_slots] = real
        self.length += num_slots
        self.next_positions = self.next_positions + num_tokens

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows in the given order (beam search, dropping finished rows).

        Args:
            rows: [B'] indices of present rows, repeats allowed.
        """
        used = self.keys[:, rows, :, : self.length], self.values[:, rows, :, : self.length]
        if len(rows) == self.batch_size:
            self.keys[:, :, :, : self.length], self.values[:, :, :, : self.length] = used
        else:
            shape = (self.keys.shape[0], len(rows), *self.keys.shape[2:])
            keys, values = self.keys.new_empty(shape), self.values.new_empty(shape)
            keys[:, :, :, : self.length], values[:, :, :, : self.length] = used
            self.keys, self.values = keys, values
        self.next_positions = self.next_positions[rows]
        self.real = None if self.real is None else self.real[rows]
