"""A plan: what a protocol scores on one data set, and how it computes its metrics from the scores."""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from bloomlm.evaluation.metrics import LARGEST_EXPONENT, Metric
from bloomlm.evaluation.scoring.batches import join_shares
from bloomlm.evaluation.scoring.models import window_scorer
from bloomlm.evaluation.scoring.windows import Window, WindowScore
from bloomlm.evaluation.subject import Subject
from bloomlm.files.resumable import ResumableResults

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A definition under which numbers can be compared."""

    name: str
    version: str
    """Changes whenever the numbers do."""
    source: str
    """Whose definition it is."""


class Display(Protocol):
    """Shows how an evaluation goes; called on every rank."""

    def notice(self, text: str) -> None:
        """Show something that the user should know."""
        ...

    def progress(self, num_done: int, total: int, result: str) -> None:
        """Show how many windows or answers are finished, and the result so far in a few words."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a plan; the same on every rank."""

    metrics: Mapping[str, Metric]
    run: Mapping[str, Any]
    """Seconds without loading, and what else describes the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are known only at the end."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Counts that are known only at the end."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a plan is run.

    Attributes:
        subject: to evaluate.
        batch_size: windows of the longest length, or prompts, at once.
        finished: the results of a stopped run, to which this one's are added; None: nothing is kept.
        display: shows the progress.
    """

    subject: Subject
    batch_size: int
    finished: ResumableResults | None
    display: Display

    def collect(
        self,
        batches: Callable[[Collection[int]], Iterator[dict[int, R]]],
        total: int,
        *,
        encode: Callable[[R], Mapping[str, Any]],
        decode: Callable[[Mapping[str, Any]], R],
        summary: Callable[[], Callable[[Collection[R]], str]],
    ) -> tuple[list[R], int]:
        """All results of a run, in their order: those of a stopped run, and those of all copies of the model.

        Args:
            batches: takes the numbers that are finished and yields this copy's share of the others, batch by batch.
            total: how many results there are.
            encode, decode: a result to the fields of a JSON object, and back.
            summary: makes a function that is given results batch by batch and describes all of them so far.

        Returns:
            The results, and how many of them a stopped run left.

        Raises:
            CheckpointError: the results cannot be written.
        """
        done = {} if self.finished is None else self.finished.done
        before = {number: decode(fields) for number, fields in done.items()}
        own: dict[int, R] = {}
        describe = summary()
        self.display.progress(len(before), total, describe(before.values()))
        for batch in batches(before.keys()):
            own |= batch
            if self.finished is not None:
                self.finished.add({number: encode(result) for number, result in batch.items()})
            # the other copies have finished about as many
            num_done = len(before) + len(own) * self.subject.mesh.degrees.dp
            text = describe(batch.values())
            if num_done < total:
                self.display.progress(num_done, total, text)
        results = before | join_shares(own, self.subject.mesh)
        self.display.progress(total, total, summary()(results.values()))
        return [results[number] for number in range(total)], len(before)


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """One data set under one protocol."""

    definition: Definition
    task: str
    settings: Mapping[str, Any]
    """What decides the numbers besides the data: flag -> value."""
    counts: Mapping[str, float]
    """What was counted in the data, for the report."""
    notices: tuple[str, ...] = ()
    """What the reader of the numbers should know."""

    @abstractmethod
    def run(self, execution: Execution) -> Outcome:
        """Compute the metrics; every rank must make this call.

        Raises:
            ConfigError: memory ran out on a single piece, or the model gives no numbers.
            CheckpointError: results cannot be written.
        """


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the windows scored so far."""

    log_prob: float = 0.0
    num_scored: int = 0
    num_windows: int = 0
    num_greedy: int = 0
    """Windows whose labels greedy decoding would have given."""

    def plus(self, scores: Collection[WindowScore]) -> "Totals":
        """The sums with more windows; windows without a scored position are not counted."""
        scored = [score for score in scores if score.num_scored]
        return Totals(
            log_prob=self.log_prob + sum(score.log_prob for score in scored),
            num_scored=self.num_scored + sum(score.num_scored for score in scored),
            num_windows=self.num_windows + len(scored),
            num_greedy=self.num_greedy + sum(score.is_greedy for score in scored),
        )


@dataclass(frozen=True, kw_only=True)
class WindowPlan(Plan):
    """A plan that scores windows."""

    windows: Sequence[Window]
    metrics: Callable[[Sequence[WindowScore]], dict[str, Metric]]
    """Computes the metrics from the scores of all windows, in their order."""
    running: Callable[[Totals], str]
    """Describes the result so far in a few words."""

    def run(self, execution: Execution) -> Outcome:
        """Score the windows."""
        subject = execution.subject
        max_batch_tokens = execution.batch_size * self.settings["seq_length"]
        scorer = window_scorer(subject.model, max_batch_tokens=max_batch_tokens, mesh=subject.mesh)
        started = time.perf_counter()
        scores, num_before = execution.collect(
            lambda done: scorer.score(self.windows, done),
            len(self.windows),
            encode=dataclasses.asdict,
            decode=lambda fields: WindowScore(**fields),
            summary=self._summary,
        )
        metrics = self.metrics(scores)
        seconds = time.perf_counter() - started
        num_tokens = sum(subject.mesh.gather_copies(scorer.num_computed_tokens))
        run = {
            "seconds": seconds,
            "computed_tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds if seconds else 0.0,
            "windows_of_a_stopped_run": num_before,
        }
        counts = {"windows": len(self.windows), "scored_tokens": sum(score.num_scored for score in scores)}
        return Outcome(metrics=metrics, run=run, counts=counts)

    def _summary(self) -> Callable[[Collection[WindowScore]], str]:
        totals = Totals()

        def describe(scores: Collection[WindowScore]) -> str:
            nonlocal totals
            totals = totals.plus(scores)
            return self.running(totals)

        return describe


def running_perplexity(totals: Totals) -> str:
    """Loss and perplexity of the tokens so far."""
    loss = -totals.log_prob / max(totals.num_scored, 1)
    return f"loss {loss:.4f}  perplexity {math.exp(min(loss, LARGEST_EXPONENT)):.4g}"


def running_accuracy(totals: Totals) -> str:
    """Part of the examples so far that greedy decoding gets right."""
    return f"accuracy {totals.num_greedy / max(totals.num_windows, 1):.4f}"
