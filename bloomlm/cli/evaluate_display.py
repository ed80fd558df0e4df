"""What `bloomlm evaluate` shows while it runs: a bar with the result so far, or a line now and then."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class EvaluationDisplay:
    """A bar on a terminal, lines anywhere else.

    Args:
        console: where to.
        total: windows or examples of the whole evaluation.
        logging_steps: calls of show from one line to the next.
    """

    def __init__(self, console: Console, *, total: int, logging_steps: int) -> None:
        self._console = console
        self._total = total
        self._logging_steps = logging_steps
        self._num_shown = 0
        columns = (
            TextColumn("evaluating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[result]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("evaluating", total=total, result="")

    def __enter__(self) -> "EvaluationDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, num_done: int, result: str) -> None:
        """Note that a batch is done.

        Args:
            num_done: windows or examples so far.
            result: in a few words.
        """
        self._progress.update(self._task, completed=num_done, result=result)
        is_due = self._num_shown % self._logging_steps == 0 or num_done == self._total
        if is_due and num_done and not self._console.is_terminal:
            self._console.print(f"{num_done}/{self._total}  {result}".rstrip(), markup=False, highlight=False)
        self._num_shown += 1
