"""The interface of a model that generates. BLOOM in PyTorch and programs of every format have it.

Shapes: B rows of a call, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from bloomlm.row_memory import RowFeatures


class ModelRows(Protocol):
    """Memory for sequences that are being continued, one in each row; a row stays in place when others change.

    Not every model has all of it: LanguageModel.features says which, and the others raise ProgramError.
    """

    def prefill(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], *, num_logits: Sequence[int] | None = None
    ) -> Tensor:
        """Append tokens to rows. Long texts may be read in several calls.

        Args:
            rows: B different rows, free or not.
            prompts: B lists of at least one id.
            num_logits: for each row, how many of its last new tokens get logits; 0 where none are wanted. More than 1
                needs the feature scores_chunks. None: one of each row.

        Returns:
            [sum(num_logits), V] logits of the token after each of these, row by row; by default [B, V].
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

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep the first num_tokens tokens of a row; needs the feature truncates.

        Raises:
            ValueError: the row has fewer.
        """
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        ...

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        ...

    def set_adapter(self, row: int, name: str | None) -> None:
        """Let a free row use an adapter from its first token on, until it is freed; needs the feature adapters.

        Args:
            row: a free row.
            name: name of the adapter; None: the model without one.

        Raises:
            AdapterError: there is no such adapter.
        """
        ...

    def read_block(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of what the model remembers of tokens start .. stop of a row; needs the feature blocks.

        Its last dimension but one are the tokens; the others are the model's own. Virtual tokens are not counted.

        Raises:
            ValueError: the row has fewer tokens.
        """
        ...

    def write_blocks(self, row: int, blocks: Sequence[Tensor]) -> None:
        """Let a row begin with tokens that were read in another row; needs the feature blocks.

        Args:
            row: a row without tokens; its adapter is that of the other row.
            blocks: what read_block returned for the tokens, from the first one on and in their order.
        """
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

    @property
    def features(self) -> RowFeatures:
        """What its rows can do."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes that its rows take for each token, about."""
        ...

    def open_rows(self, num_rows: int, num_tokens: int) -> ModelRows:
        """Room for num_rows sequences of at most num_tokens tokens each, all rows free."""
        ...
