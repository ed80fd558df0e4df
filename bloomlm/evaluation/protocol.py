"""A protocol: a definition of numbers with its tasks and their options. protocols/ has one file for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomlm.evaluation.metrics import Metric
from bloomlm.evaluation.plan import Plan
from bloomlm.flags import Flags, flag


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
