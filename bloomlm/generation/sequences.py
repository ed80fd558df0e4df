"""The sequences of a session: what belongs to each of them alone.

Shapes: W beams, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from bloomlm.generation.beam import BeamSearchState, regrow
from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.log_probs import TokenScore
from bloomlm.generation.lookup import PromptLookup, accept

FinishReason = Literal["eos", "length", "stop", "stop_token"]
"""eos: the model ended the sequence; stop: a stop text occurred; stop_token: one of stop_token_ids did; length:
max_new_tokens were generated."""
DecodeText = Callable[[list[int]], str]
StopTest = Callable[[list[int]], bool]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One new token of one sequence."""

    handle: int
    """Handle of the sequence."""
    token: int
    """Its new id."""
    finish_reason: FinishReason | None
    """Why the sequence ends with this token; None where it goes on."""
    log_prob: float | None = None
    """Its log-probability in the distribution of the model, on which no option has acted; None: not asked for."""
    top_log_probs: tuple[tuple[int, float], ...] | None = None
    """The num_log_probs likeliest ids of that distribution with their log-probabilities, likeliest first."""


@dataclass(eq=False)
class Running:
    """The common part of samples and beam searches."""

    handles: Sequence[int]
    """Handles of its results."""
    rows: list[int]
    """Rows of the model's memory."""
    config: GenerationConfig
    """How it is continued."""
    group: "LogitOptions"
    """Sequences with equal groups choose their tokens together."""
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
    lookup: PromptLookup | None
    """Its tokens, where the next ones may be guessed."""
    tokens: list[int] = field(default_factory=list)
    """The tokens generated so far."""

    def guess(self, most: int) -> list[int]:
        """Guess at most this many of the next tokens, and not so many that the last one could not be used."""
        count = min(most, self.config.max_new_tokens - len(self.tokens) - 1)
        if self.lookup is None or len(self.tokens) < self.config.min_new_tokens or count < 1:
            return []
        return self.lookup.guess(min(count, self.lookup.reach))

    def accept(self, guesses: Sequence[int], chosen: Sequence[int]) -> list[int]:
        """The tokens that are right; see lookup.accept."""
        right = accept(guesses, chosen)
        if self.lookup is not None and guesses:
            self.lookup.reach = 2 * len(right)
        return right

    def extend(
        self, tokens: Sequence[int], scores: Sequence[TokenScore] | None, eos_token_id: int | None
    ) -> Iterator[Event]:
        """Add tokens, up to one that ends the sequence."""
        for place, token in enumerate(tokens):
            self.tokens.append(token)
            if self.lookup is not None:
                self.lookup.append(token)
            log_prob, top = None, None
            if scores is not None:
                log_prob, top = scores[place].log_prob, scores[place].top_log_probs[: self.config.num_log_probs]
            reason = self.finish_reason(self.tokens, eos_token_id)
            yield Event(handle=self.handles[0], token=token, finish_reason=reason, log_prob=log_prob, top_log_probs=top)
            if reason is not None:
                return


@dataclass(eq=False)
class Search(Running):
    """A beam search: as many rows as beams, as many handles as results."""

    state: BeamSearchState
    """Scores and tokens of the beams."""

    def advance(self, log_probs: Tensor) -> list[tuple[int, int]]:
        """Take one step by the beams' log-probabilities [W, V] -> the copies to make of rows, (source, target) each."""

        def ends(tokens: list[int]) -> bool:
            return self.finish_reason(tokens, None) in ("stop_token", "stop")

        parents, _ = self.state.advance(log_probs, ends if self.config.stop or self.config.stop_token_ids else None)
        if not self.state.is_open:
            return []
        self.rows, copies = regrow(self.rows, parents.tolist())
        return copies

    def events(self, eos_token_id: int | None) -> list[Event]:
        """The tokens of its results, once it has ended."""
        events = []
        for handle, found in zip(self.handles, self.state.best(len(self.handles)), strict=True):
            reasons = [None] * (len(found) - 1) + [self.finish_reason(found, eos_token_id)]
            pairs = zip(found, reasons, strict=True)
            events += [Event(handle=handle, token=token, finish_reason=reason) for token, reason in pairs]
        return events


class LogitOptions:
    """The options that act on logits, hashed once, because each step looks for sequences with equal ones.

    Args:
        config: a sequence's options.
    """

    def __init__(self, config: GenerationConfig) -> None:
        strategy = config.strategy
        if isinstance(strategy, Sampling):
            strategy = replace(strategy, seed=0)
        self.config = replace(
            config,
            strategy=strategy,
            stop=(),
            stop_token_ids=config.stop_token_ids if config.min_new_tokens else (),
            ignore_eos=False,
            max_new_tokens=max(1, config.min_new_tokens),
            num_return_sequences=1,
            num_log_probs=None,
        )
        """The options; those that do not act on logits are replaced by constants."""
        self._hash = hash(self.config)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogitOptions) and self._hash == other._hash and self.config == other.config


def find_stop(text: str, stop: Sequence[str], behind: int) -> int | None:
    """Where the first stop text begins that ends behind the first `behind` characters; None without one."""
    places = [text.find(end, max(0, behind - len(end) + 1)) for end in stop]
    return min((place for place in places if place >= 0), default=None)


def stop_test(stop: Sequence[str], decode_text: DecodeText | None, min_tokens: int = 0) -> StopTest:
    """A function that tells whether tokens contain a stop text, where all but the last token did not.

    Args:
        stop: the stop texts.
        decode_text: ids to text.
        min_tokens: a stop text counts only where it ends behind the text of so many tokens, as in vLLM.
    """
    if not stop or decode_text is None:
        return lambda tokens: False
    # A stop text that the last token completes lies within as many tokens as it has bytes, at one byte a token,
    # unless there are special tokens among them, which have no text.
    window = max(len(text.encode()) for text in stop) + 1
    longest = max(map(len, stop))

    def test(tokens: list[int]) -> bool:
        if len(tokens) <= min_tokens:
            return False
        # The short text is cheap, but may begin inside a character, so the whole text decides.
        count = window
        while len(end := decode_text(tokens[-count:])) <= longest and count < len(tokens):
            count *= 2
        if find_stop(end, stop, 0) is None:
            return False
        return find_stop(decode_text(tokens), stop, len(decode_text(tokens[:min_tokens]))) is not None

    return test
