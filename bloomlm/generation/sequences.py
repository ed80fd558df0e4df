"""The sequences of a session: what belongs to each of them alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bloomlm.generation.beam import BeamSearchState
from bloomlm.generation.config import GenerationConfig, Sampling

FinishReason = Literal["eos", "length", "stop"]
DecodeText = Callable[[list[int]], str]
StopTest = Callable[[list[int]], bool]


@dataclass(eq=False)
class Running:
    """What samples and searches have in common."""

    handles: Sequence[int]
    """Of its results."""
    rows: list[int]
    """Rows of the model's memory."""
    config: GenerationConfig
    """How it is continued."""
    group: GenerationConfig
    """Sequences of the same group choose their tokens together."""
    stops: StopTest
    """Whether tokens now contain a stop text."""

    def finish_reason(self, tokens: list[int], eos_token_id: int | None) -> FinishReason | None:
        """Why a continuation ends with its last token; None where it goes on."""
        if tokens[-1] == eos_token_id:
            return "eos"
        if self.stops(tokens):
            return "stop"
        return "length" if len(tokens) == self.config.max_new_tokens else None


@dataclass(eq=False)
class Sample(Running):
    """One sequence, decoded greedily or by sampling."""

    uniforms: list[float]
    """A random number for each of its tokens; none for greedy decoding."""
    tokens: list[int] = field(default_factory=list)
    """What was generated."""


@dataclass(eq=False)
class Search(Running):
    """A beam search: as many rows as beams, as many handles as results."""

    state: BeamSearchState
    """Scores and tokens of the beams."""


def group_of(config: GenerationConfig) -> GenerationConfig:
    """The options that act on logits; the others are each sequence's own."""
    strategy = config.strategy
    if isinstance(strategy, Sampling):
        strategy = replace(strategy, seed=0)
    longest = max(1, config.min_new_tokens)
    return replace(config, strategy=strategy, stop=(), max_new_tokens=longest, num_return_sequences=1)


def stop_test(stop: Sequence[str], decode_text: DecodeText | None) -> StopTest:
    """Whether tokens, the last of which is new, now contain a stop text."""
    if not stop or decode_text is None:
        return lambda tokens: False
    # A stop text that the last token completes lies within as many tokens as it has bytes, at one byte a token.
    window = max(len(text.encode()) for text in stop) + 1

    def contains(text: str) -> bool:
        return any(end in text for end in stop)

    def test(tokens: list[int]) -> bool:
        # The short text first; it may begin inside a character, so the whole text decides.
        return contains(decode_text(tokens[-window:])) and contains(decode_text(tokens))

    return test
