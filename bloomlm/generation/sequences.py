"""The sequences of a session: what belongs to each of them alone, and the tokens in their rows.

Shapes: B rows of a call, S tokens of the longest row, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from bloomlm.generation.beam import BeamSearchState
from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.sampling import (
    add_bias,
    apply_count_penalties,
    apply_repetition_penalty,
    ban_repeated_ngrams,
    ban_tokens,
)

FinishReason = Literal["eos", "length", "stop", "stop_token"]
"""eos: the model ended the sequence; stop: a stop text occurred; stop_token: one of stop_token_ids did; length:
max_new_tokens were generated."""
DecodeText = Callable[[list[int]], str]
StopTest = Callable[[list[int]], bool]


@dataclass(eq=False)
class Running:
    """The common part of samples and beam searches."""

    handles: Sequence[int]
    """Handles of its results."""
    rows: list[int]
    """Rows of the model's memory."""
    config: GenerationConfig
    """How it is continued."""
    group: GenerationConfig
    """Sequences with equal groups choose their tokens together; see group_of."""
    stops: StopTest
    """Whether tokens now contain a stop text."""

    def finish_reason(self, tokens: list[int], eos_token_id: int | None) -> FinishReason | None:
        """Why a continuation ends with its last token; None where it goes on."""
        if tokens[-1] == eos_token_id and not self.config.ignore_eos:
            return "eos"
        if tokens[-1] in self.config.stop_token_ids:
            return "stop_token"
        if self.stops(tokens):
            return "stop"
        return "length" if len(tokens) == self.config.max_new_tokens else None


@dataclass(eq=False)
class Sample(Running):
    """One sequence, decoded greedily or by sampling."""

    uniforms: list[float]
    """A random number for each of its tokens; empty for greedy decoding."""
    tokens: list[int] = field(default_factory=list)
    """The tokens generated so far."""


@dataclass(eq=False)
class Search(Running):
    """A beam search: as many rows as beams, as many handles as results."""

    state: BeamSearchState
    """Scores and tokens of the beams."""

    def is_stopped(self, tokens: list[int]) -> bool:
        """Whether a continuation ends with its last token by one of stop_token_ids or a stop text."""
        return self.finish_reason(tokens, None) in ("stop_token", "stop")


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


def group_of(config: GenerationConfig) -> GenerationConfig:
    """The options that act on logits; every other option is replaced by a constant."""
    strategy = config.strategy
    if isinstance(strategy, Sampling):
        strategy = replace(strategy, seed=0)
    longest = max(1, config.min_new_tokens)
    return replace(
        config,
        strategy=strategy,
        stop=(),
        stop_token_ids=config.stop_token_ids if config.min_new_tokens else (),
        ignore_eos=False,
        max_new_tokens=longest,
        num_return_sequences=1,
        num_log_probs=None,
    )


def stop_test(stop: Sequence[str], decode_text: DecodeText | None) -> StopTest:
    """A function that tells whether tokens contain a stop text, where all but the last token did not."""
    if not stop or decode_text is None:
        return lambda tokens: False
    # A stop text that the last token completes lies within as many tokens as it has bytes, at one byte a token.
    window = max(len(text.encode()) for text in stop) + 1

    def contains(text: str) -> bool:
        return any(end in text for end in stop)

    def test(tokens: list[int]) -> bool:
        # The short text is cheap, but may begin inside a character, so the whole text decides.
        return contains(decode_text(tokens[-window:])) and contains(decode_text(tokens))

    return test
