"""Guesses of the next tokens by looking up the last ones in the same text, for prompt lookup decoding.

A text often repeats itself: names, quotations, code. Where its last tokens occurred before, the tokens that followed
then are a guess, which the model checks in one pass. Greedy tokens stay the same; only their number in a step changes.

Sources: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding, and inference with reference,
Yang et al. 2023, https://arxiv.org/abs/2304.04487.
"""

from collections.abc import Sequence
from itertools import takewhile

from bloomlm.generation.config import GenerationConfig, Greedy

_NGRAM_SIZES = (3, 2)
"""The longest match decides. Matches of a single token are wrong so often that they cost more passes than they save."""


class PromptLookup:
    """The tokens of a sequence, indexed by what came before them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        """Run of 2 or 3 tokens -> the place after its newest occurrence, where a token follows it."""
        self.reach = 4
        """Tokens that are worth guessing: twice as many as were right last time, and two more. Where a text does not
        repeat itself, wrong guesses then cost little."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the sequence."""
        stop = len(self._tokens)
        for size in _NGRAM_SIZES:
            if size <= stop:
                self._followers[tuple(self._tokens[stop - size :])] = stop
        self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """The count tokens after the newest place where the last tokens occurred before; empty without such a place."""
        known = list(self._tokens)
        matches = (self._followers.get(tuple(known[-size:])) for size in _NGRAM_SIZES if size <= len(known))
        start = next((place for place in matches if place is not None), None)
        if start is None:
            return []
        for place in range(start, start + count):
            known.append(known[place])  # a guess that reaches the end of the text goes on with itself: a loop
        return known[len(self._tokens) :]


def accept(guesses: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """The tokens that are right, at least one: up to the first that follows a wrong guess.

    Args:
        guesses: N tokens.
        chosen: the token that the model chooses before the first guess, and after each, N + 1 tokens.
    """
    pairs = zip(guesses, chosen, strict=False)
    num_right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return list(chosen[: num_right + 1])


def can_be_guessed(config: GenerationConfig) -> bool:
    """Whether a continuation is greedy and depends on no penalty, so that several tokens can be checked in one pass."""
    penalties = ("repetition_penalty", "no_repeat_ngram_size", "frequency_penalty", "presence_penalty")
    plain = GenerationConfig()
    return isinstance(config.strategy, Greedy) and all(getattr(config, n) == getattr(plain, n) for n in penalties)
