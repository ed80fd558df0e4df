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
from bloomlm.evaluation.scoring.windows import Window, WindowScore, continuation_windows
from bloomlm.flags import Flags, flag


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A definition of numbers; only numbers under the same definition can be compared."""

    name: str
    version: str
    """Changes whenever the numbers do."""
    source: str
    """The program or paper that it comes from."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a plan; the same on every rank."""

    metrics: Mapping[str, Metric]
    run: Mapping[str, Any]
    """What describes the run: seconds without loading, and so on."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that become known during the run."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Counts that become known during the run."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """One data set under one protocol."""

    definition: Definition
    task: str
    settings: Mapping[str, Any]
    """The flags that decide the numbers, with their values."""
    counts: Mapping[str, float]
    """Numbers of windows, tokens, words and so on in the data, for the report."""
    notices: tuple[str, ...] = ()
    """Warnings for the reader of the numbers."""

    @abstractmethod
    def run(self, execution: Execution) -> Outcome:
        """Compute the metrics; every rank must make this call.

        Raises:
            ConfigError: memory ran out on a single window or prompt, or the model computes no finite numbers.
            CheckpointError: results cannot be written.
        """


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the windows scored so far."""

    log_prob: float = 0.0
    num_scored: int = 0
    num_windows: int = 0
    num_greedy: int = 0
    """Windows whose labels greedy decoding would generate."""

    def plus(self, scores: Collection[WindowScore]) -> "Totals":
        """The sums with more windows; a window without a label does not count."""
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


def last_word_plan(
    definition: Definition,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    seq_length: int,
    metrics: Callable[[Sequence[WindowScore]], dict[str, Metric]],
) -> WindowPlan:
    """The plan of LAMBADA: score the last word of each passage.

    Args:
        definition: the definition of the metrics.
        pairs: ids of the context and of the last word of each passage.
        seq_length: most tokens that the model sees; a longer context is cut at its beginning.
        metrics: computes the metrics from the scores of the words.
    """
    windows, num_cut = continuation_windows(pairs, seq_length)
    return WindowPlan(
        definition=definition,
        task="lambada",
        settings={"seq_length": seq_length},
        counts={"examples": len(windows), "contexts_cut": num_cut},
        windows=windows,
        metrics=metrics,
        running=running_accuracy,
    )


def running_perplexity(totals: Totals) -> str:
    """Loss and perplexity of the tokens so far."""
    loss = -totals.log_prob / max(totals.num_scored, 1)
    return f"loss {loss:.4f}  perplexity {math.exp(min(loss, LARGEST_EXPONENT)):.4g}"


def running_accuracy(totals: Totals) -> str:
    """Fraction of the examples so far that greedy decoding gets right."""
    return f"accuracy {totals.num_greedy / max(totals.num_windows, 1):.4f}"


@dataclass(frozen=True, kw_only=True)
class WindowOptions(Flags):
    """The option of tasks that score windows of tokens."""

    seq_length: int = flag("protocol", 2048, "maximum tokens that the model sees at once", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of data under a protocol."""

    name: str
    """wikitext, lambada, or the name of the protocol's only task."""
    make_plan: Callable[..., Plan]
    """(data, tokenizer, *, limit, **options) -> the plan of the data, which `read` returned, under these options. The
    limit is the number of examples, documents or windows to evaluate, from the first; None: all."""
    read: Callable[[Path], Any] = lambda path: path
    """Reads the data from a file, or leaves that to make_plan."""
    options: type[Flags] = WindowOptions
    """The flags that decide the numbers, with the defaults of this protocol."""
    line: Callable[[Mapping[str, Metric], Mapping[str, float]], str] | None = None
    """(metrics, counts) -> the line that the original program prints."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to evaluate."""

    name: str
    """The value of --protocol."""
    help: str
    """Where the definition comes from, in a few words."""
    tasks: tuple[Task, ...]
    uses_raw_text: bool = True
    """Whether WikiText is fetched from the hub in its raw variant, not in the one with <unk>."""
    reads_file: bool = True
    """Whether its data come from --eval_path."""

    @property
    def reads_text(self) -> bool:
        """Whether its tasks are WikiText and LAMBADA, of which the name of the file chooses one."""
        return any(task.name in ("wikitext", "lambada") for task in self.tasks)

    def task(self, text: str) -> Task | None:
        """The task for wikitext or lambada, None if there is none; the only task of protocols that read neither."""
        if not self.reads_text:
            return self.tasks[0]
        return next((task for task in self.tasks if task.name == text), None)
