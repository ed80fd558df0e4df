"""The interface of a model that generates. BLOOM in PyTorch and programs of every format have it.

Shapes: B rows of a call, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ModelRows(Protocol):
    """Memory for sequences that are being continued, one in each row; a row stays in place when others change."""

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to rows.

        Args:
            rows: B different rows, free or not.
            prompts: B lists of at least one id.

        Returns:
            [B, V] logits of each row's next token.
        """
        ...

    def decode_step(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token to each of the rows.

        Args:
            rows: B different rows, none free.
            tokens: [B] int64.

        Returns:
            [B, V] logits of the token after it.
        """
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        ...

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        ...


class LanguageModel(Protocol):
    """A model that reads and continues sequences."""

    @property
    def vocab_size(self) -> int:
        """Number of ids (V)."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a continuation."""
        ...

    def open_rows(self, num_rows: int, num_tokens: int) -> ModelRows:
        """Room for num_rows sequences of at most num_tokens tokens each, all rows free."""
        ...
