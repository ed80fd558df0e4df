"""A plan: the windows that a protocol wants scored, and what it makes of the scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bloomlm.evaluation.metrics import LARGEST_EXPONENT, Metric
from bloomlm.evaluation.scoring.windows import Window, WindowScore


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A definition that numbers can be compared under."""

    name: str
    version: str
    """Changes whenever the numbers do."""
    source: str
    """Whose definition it is."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the windows scored so far."""

    log_prob: float = 0.0
    num_scored: int = 0
    num_windows: int = 0
    num_greedy: int = 0
    """Windows whose labels greedy decoding would have given."""

    def plus(self, scores: Sequence[WindowScore]) -> "Totals":
        """The sums with more windows; such as have nothing to score do not count."""
        scored = [score for score in scores if score.num_scored]
        return Totals(
            log_prob=self.log_prob + sum(score.log_prob for score in scored),
            num_scored=self.num_scored + sum(score.num_scored for score in scored),
            num_windows=self.num_windows + len(scored),
            num_greedy=self.num_greedy + sum(score.is_greedy for score in scored),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One data set under one protocol."""

    protocol: Protocol
    task: str
    """wikitext or lambada."""
    settings: Mapping[str, int]
    """What decides the windows besides the data, by the names of the flags."""
    counts: Mapping[str, float]
    """What was counted in the data, for the report."""
    windows: Sequence[Window]
    metrics: Callable[[Sequence[WindowScore]], dict[str, Metric]]
    """Makes the results of the scores of all windows, in their order."""
    running: Callable[[Totals], str]
    """The result so far, in a few words."""
    line: Callable[[Mapping[str, Metric]], str] | None = None
    """The result in the words of the reference system, where it is its protocol."""
    notices: tuple[str, ...] = ()
    """What the reader of the numbers should know."""

    @property
    def num_scored_tokens(self) -> int:
        """Tokens whose log-probability counts."""
        return sum(window.num_scored for window in self.windows)


def running_perplexity(totals: Totals) -> str:
    """Loss and perplexity of the tokens so far."""
    loss = -totals.log_prob / max(totals.num_scored, 1)
    return f"loss {loss:.4f}  perplexity {math.exp(min(loss, LARGEST_EXPONENT)):.4g}"


def running_accuracy(totals: Totals) -> str:
    """Part of the examples so far that greedy decoding gets right."""
    return f"accuracy {totals.num_greedy / max(totals.num_windows, 1):.4f}"
