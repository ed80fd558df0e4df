"""The rows of a session: a model's memory, the tokens in it, and which rows are free.

Shapes: B rows or positions of a call, S tokens of the longest row, V vocabulary.
"""

from bisect import insort
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sampling import (
    add_bias,
    apply_count_penalties,
    apply_repetition_penalty,
    ban_repeated_ngrams,
    ban_tokens,
)


class SessionRows:
    """Rows for num_rows sequences of at most num_tokens tokens each."""

    def __init__(self, model: LanguageModel, num_rows: int, num_tokens: int) -> None:
        self.model = model.open_rows(num_rows, num_tokens)
        self.history = History(num_rows, num_tokens)
        self._free = list(range(num_rows))

    @property
    def num_free(self) -> int:
        """Number of free rows."""
        return len(self._free)

    def take(self, count: int, adapter: str | None, blocks: Sequence[Tensor]) -> list[int]:
        """Take free rows, and let the first of them begin with an adapter and with blocks of tokens; see ModelRows."""
        rows = self._free[:count]
        try:
            if adapter is not None:
                self.model.set_adapter(rows[0], adapter)
            if blocks:
                self.model.write_blocks(rows[0], blocks)
        except Exception:
            self.model.free(rows[0])
            raise
        del self._free[:count]
        return rows

    def read_next(self, unread: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Read one or more tokens of each row -> logits [B, V] of the token after each of them, by row."""
        if not unread:
            return {}
        rows, tokens = list(unread), list(unread.values())
        counts = [len(own) for own in tokens]
        if max(counts) == 1:
            logits = self.model.decode_step(rows, torch.tensor([token for (token,) in tokens]))
        else:
            logits = self.model.prefill(rows, tokens, num_logits=counts)
        return dict(zip(rows, logits.split(counts), strict=True))

    def copy(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        self.model.copy_row(source, target)
        self.history.copy_row(source, target)

    def free(self, rows: Sequence[int]) -> None:
        """Let rows be used for other sequences."""
        for row in rows:
            self.model.free(row)
            insort(self._free, row)


class History:
    """Prompt and generated tokens of each row, in memory that is allocated once."""

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        self._tokens = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
        self._num_prompt_tokens = [0] * num_rows
        self._lengths = [0] * num_rows

    def num_prompt_tokens(self, row: int) -> int:
        """Number of tokens of a row's prompt."""
        return self._num_prompt_tokens[row]

    def start(self, row: int, prompt: Sequence[int]) -> None:
        """Let a row begin with a prompt."""
        self._tokens[row, : len(prompt)] = torch.tensor(prompt)
        self._num_prompt_tokens[row] = self._lengths[row] = len(prompt)

    def append(self, row: int, token: int) -> None:
        """Add a generated token."""
        self._tokens[row, self._lengths[row]] = token
        self._lengths[row] += 1

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        self._tokens[target] = self._tokens[source]
        self._num_prompt_tokens[target] = self._num_prompt_tokens[source]
        self._lengths[target] = self._lengths[source]

    def adjust(self, logits: Tensor, rows: Sequence[int], config: GenerationConfig, eos_token_id: int | None) -> Tensor:
        """Apply the options that act under every strategy, in vLLM's order.

        Args:
            logits: [B, V] of each row's next token, float32 (log-probabilities in a beam search); it stays as it is.
            rows: B rows.
            config: the options.
            eos_token_id: the token that a row with fewer than min_new_tokens generated tokens must not take, as it must
                not take any of stop_token_ids.

        Returns:
            [B, V].
        """
        if config.logit_bias:
            logits = add_bias(logits, config.logit_bias)
        counts = [self._lengths[row] for row in rows]
        if config.repetition_penalty != 1.0 or config.no_repeat_ngram_size:
            tokens = self._tokens[list(rows), : max(counts)].to(logits.device)
            lengths = torch.tensor(counts, device=logits.device)
            if config.repetition_penalty != 1.0:
                logits = apply_repetition_penalty(logits, tokens, lengths, config.repetition_penalty)
            if config.no_repeat_ngram_size:
                logits = ban_repeated_ngrams(logits, tokens, lengths, config.no_repeat_ngram_size)
        if config.frequency_penalty or config.presence_penalty:
            generated = [self._tokens[row, self._num_prompt_tokens[row] : self._lengths[row]] for row in rows]
            logits = apply_count_penalties(logits, generated, config.frequency_penalty, config.presence_penalty)
        endings = [*config.stop_token_ids, *([] if eos_token_id is None else [eos_token_id])]
        num_generated = [count - self._num_prompt_tokens[row] for count, row in zip(counts, rows, strict=True)]
        short = [place for place, count in enumerate(num_generated) if count < config.min_new_tokens]
        return ban_tokens(logits, endings, short) if endings and short else logits
