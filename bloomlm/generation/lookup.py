"""Guesses of the next tokens by looking up the last ones in the same text, for prompt lookup decoding.

A text often repeats itself: names, quotations, code. Where its last tokens occurred before, the tokens that followed
then are a guess, which the model checks in one pass. Greedy tokens stay the same; only their number in a step changes.

Sources: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding, and inference with reference,
Yang et al. 2023, https://arxiv.org/abs/2304.04487.
"""

from collections.abc import Sequence

from bloomlm.generation.config import GenerationConfig, Greedy

_NGRAM_SIZES = (3, 2, 1)  # the longest match decides


class PromptLookup:
    """The tokens of a sequence, indexed by what came before them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        """Run of up to 3 tokens -> the place after its newest occurrence, where a token follows it."""
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


def can_be_guessed(config: GenerationConfig, num_generated: int) -> bool:
    """Whether the next tokens are greedy and depend on no penalty, so that several can be checked in one pass."""
    plain = GenerationConfig()
    return (
        isinstance(config.strategy, Greedy)
        and config.repetition_penalty == plain.repetition_penalty
        and config.no_repeat_ngram_size == plain.no_repeat_ngram_size
        and config.frequency_penalty == plain.frequency_penalty
        and config.presence_penalty == plain.presence_penalty
        and num_generated >= config.min_new_tokens
    )
