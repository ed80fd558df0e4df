"""A protocol: a definition of numbers, its tasks with their options, and the plan that scores one data set under it.

protocols/ has one file for each.
"""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bloomlm.evaluation.execution import Execution
from bloomlm.evaluation.metrics import LARGEST_EXPONENT, Metric
from bloomlm.evaluation.scoring.scorers import window_scorer
from bloomlm.evaluation.scoring.windows import Window, WindowScore
from bloomlm.flags import Flags, flag


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A definition under which numbers can be compared."""

    name: str
    version: str
    """Changes whenever the numbers do."""
    source: str
    """Whose definition it is."""


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


@dataclass(frozen=True, kw_only=True)
class WindowOptions(Flags):
    """The option of tasks that score windows of tokens."""

    seq_length: int = flag("protocol", 2048, "most tokens that the model sees", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of data under a protocol."""

    name: str
    """wikitext, lambada, or the name of the protocol's only task."""
    make_plan: Callable[..., Plan]
    """(data, tokenizer, limit=..., **options) -> plan, where data is what `read` returns."""
    read: Callable[[Path], Any] = lambda path: path
    """Reads the data from a file."""
    options: type[Flags] = WindowOptions
    """The flags that decide the numbers, with their defaults under this protocol."""
    line: Callable[[Mapping[str, Metric], Mapping[str, float]], str] | None = None
    """(metrics, counts) -> the line that the program whose definition this is prints."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to evaluate."""

    name: str
    """As given to --protocol."""
    help: str
    """Whose definition it is, in a few words."""
    tasks: tuple[Task, ...]
    uses_raw_text: bool = True
    """Whether WikiText from the hub is the raw variant; else it is the one with <unk>."""
    reads_file: bool = True
    """Whether its data come from --eval_path."""

    @property
    def reads_text(self) -> bool:
        """Whether it reads WikiText or LAMBADA, which the name of the file tells apart."""
        return any(task.name in ("wikitext", "lambada") for task in self.tasks)

    def task(self, text: str) -> Task | None:
        """The task to run; None where the protocol does not define it.

        Args:
            text: wikitext or lambada; protocols that read neither have one task.
        """
        if not self.reads_text:
            return self.tasks[0]
        return next((task for task in self.tasks if task.name == text), None)
