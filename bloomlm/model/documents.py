"""The real tokens of a batch, packed one after another without pads.

The model's linear layers see packed tokens only, and attention stays within a document. A padded batch is packed by its
attention mask, so pads cost nothing and change nothing.

Shapes: B batch, T padded length, N packed tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """The lengths of the documents that N packed tokens form, and the tokens' places in the padded [B, T] batch."""

    lengths: tuple[int, ...]
    """Tokens of each document, in packed order; they add up to N."""
    padded_shape: tuple[int, int]
    """B and T of the padded batch."""
    indices: Tensor | None = None
    """[N] positions of the packed tokens in the flattened [B * T] batch; None where there are no pads."""

    @classmethod
    def packed(cls, lengths: Sequence[int]) -> "Documents":
        """Documents that are packed already: N = sum(lengths) tokens in one row."""
        return cls(tuple(lengths), (1, sum(lengths)))

    @classmethod
    def equal(cls, batch_size: int, length: int) -> "Documents":
        """A batch of rows of the same length, without pads."""
        return cls((length,) * batch_size, (batch_size, length))

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> "Documents":
        """The rows of a padded batch.

        Args:
            attention_mask: [B, T], nonzero at real tokens; pads may be left, right or in between.

        Raises:
            ValueError: a row without any real token.
        """
        batch_size, length = attention_mask.shape
        real = attention_mask.bool()
        lengths = tuple(int(n) for n in real.sum(dim=1).tolist())
        if 0 in lengths:
            raise ValueError(f"row {lengths.index(0)} of the attention mask has no real token")
        if min(lengths) == length:
            return cls.equal(batch_size, length)
        return cls(lengths, (batch_size, length), real.flatten().nonzero().squeeze(1))

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...], the real tokens only."""
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat[self.indices]

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], zero at pads."""
        batch_size, length = self.padded_shape
        if self.indices is not None:
            flat = packed.new_zeros(batch_size * length, *packed.shape[1:])
            packed = flat.index_copy(0, self.indices, packed)
        return packed.unflatten(0, (batch_size, length))

    def in_multiples(self, unit: int) -> "Documents":
        """Packed documents, with one more behind them where the number of tokens is not a multiple of unit."""
        missing = -sum(self.lengths) % unit
        return Documents.packed((*self.lengths, missing)) if missing else self

    def positions(self, device: torch.device) -> Tensor:
        """[N] position of each token within its document, from 0."""
        return torch.cat([torch.arange(n, device=device) for n in self.lengths])
