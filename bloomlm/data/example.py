"""One example, and what every set of examples offers, whichever form its rows had."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A sequence of tokens, some spans of which the model learns to write."""

    tokens: npt.NDArray[np.int32]
    """All tokens, in order."""
    learned: tuple[tuple[int, int], ...]
    """Start and end of each span of learned tokens, in order and without overlaps; at least one."""
    source_text: str
    """The text before the last span, before it was cut."""
    target_text: str
    """The text of the last span, before it was cut."""
    document_starts: tuple[int, ...] = (0,)
    """Where each of its documents starts; they do not see each other, and nothing predicts the first token of one."""

    @classmethod
    def pair(
        cls, tokens: npt.NDArray[np.int32], num_source_tokens: int, *, source_text: str = "", target_text: str = ""
    ) -> Self:
        """A source, which is given, and a target with its </s>, which is learned."""
        span = (num_source_tokens, len(tokens))
        return cls(tokens=tokens, learned=(span,), source_text=source_text, target_text=target_text)

    @property
    def num_source_tokens(self) -> int:
        """Number of tokens before the last span."""
        return self.learned[-1][0]

    @property
    def prompt_tokens(self) -> npt.NDArray[np.int32]:
        """The tokens from which an answer is generated, to compare with the last span."""
        return self.tokens[: self.num_source_tokens]


class Examples(Protocol):
    """What a loader reads: examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    @property
    def lengths(self) -> Sequence[int] | npt.NDArray[np.int64]:
        """Number of tokens of each example; a loader with a TokenBudget needs it."""
        ...


class TrainingSet(Examples, Protocol):
    """What a run reads: a set of examples that can be divided and described."""

    @property
    def name(self) -> str:
        """Where the examples come from, for messages."""
        ...

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all examples."""
        ...

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that are learned."""
        ...

    @property
    def unit(self) -> str:
        """What its examples are called, in the plural."""
        ...

    def describe(self) -> Iterable[str]:
        """What else there is to say about it when a run begins, line by line."""
        ...

    def hold_out(self, most: int) -> tuple[Self, Self]:
        """The examples without the last 5 %, at least one and at most so many, and these; the first may be empty."""
        ...


class Divisible(Protocol):
    """A set of examples that can be divided."""

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int, /) -> Self:
        """The examples from start to stop - 1."""
        ...


D = TypeVar("D", bound=Divisible)


def divide(examples: D, most: int) -> tuple[D, D]:
    """The two parts of TrainingSet.hold_out."""
    size = len(examples)
    split = size - max(1, min(most, size // 20))
    return examples.part(0, split), examples.part(split, size)
