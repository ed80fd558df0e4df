"""The tokens of each row so far, and the options that depend on them.

Shapes: B rows of a call, S tokens of the longest of them, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.sampling import apply_repetition_penalty, ban_repeated_ngrams, ban_token


class History:
    """Prompt and generated tokens of each row, which begin at its first place, in memory that is allocated once."""

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        """Allocate num_rows rows of num_tokens tokens."""
        self._tokens = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
        self._num_prompt_tokens = [0] * num_rows
        self._lengths = [0] * num_rows

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
        """Apply the options that act under every strategy: penalty, repeated runs, shortest length.

        Args:
            logits: [B, V] of each row's next token, float32 (log-probabilities in a beam search).
            rows: B rows.
            config: what to apply.
            eos_token_id: the token that a row shorter than min_new_tokens must not take.

        Returns:
            [B, V].
        """
        if config.repetition_penalty != 1.0 or config.no_repeat_ngram_size:
            counts = [self._lengths[row] for row in rows]
            tokens = self._tokens[list(rows), : max(counts)].to(logits.device)
            lengths = torch.tensor(counts, device=logits.device)
            if config.repetition_penalty != 1.0:
                logits = apply_repetition_penalty(logits, tokens, lengths, config.repetition_penalty)
            if config.no_repeat_ngram_size:
                logits = ban_repeated_ngrams(logits, tokens, lengths, config.no_repeat_ngram_size)
        if eos_token_id is not None:
            generated = [self._lengths[row] - self._num_prompt_tokens[row] for row in rows]
            short = [place for place, count in enumerate(generated) if count < config.min_new_tokens]
            logits = ban_token(logits, eos_token_id, short) if short else logits
        return logits
