"""What verbs that write large files show: how many bytes are done and at what rate."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bloomlm.checkpoint.output_directory import Report
from bloomlm.training.report import size

LINE_SECONDS = 2.0
"""At least, from one line to the next where there is no bar."""
NUM_LINES = 10


class BytesDisplay:
    """A bar for each phase on a terminal, up to ten lines anywhere else.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> "BytesDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, total_bytes: int) -> Report:
        """A part of the work, shown from its first bytes on.

        Args:
            name: what it does, such as "writing".
            total_bytes: of the whole phase.

        Returns:
            A function to be told the number of bytes whenever some more are done.
        """
        return _Phase(self._console, self._progress, name, total_bytes).advance


class _Phase:
    def __init__(self, console: Console, progress: Progress, name: str, total_bytes: int) -> None:
        self._console, self._progress = console, progress
        self._name, self._total_bytes = name, total_bytes
        self._task = progress.add_task(name, total=total_bytes, visible=False, start=False)
        self._done_bytes = self._num_lines = 0
        self._start = self._last_line = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """Note that some more bytes are done."""
        if not self._done_bytes:
            self._start = self._last_line = time.monotonic()
            self._progress.start_task(self._task)
        self._done_bytes += num_bytes
        self._progress.update(self._task, completed=self._done_bytes, visible=True)
        if not self._console.is_terminal:
            self._print_when_due()

    def _print_when_due(self) -> None:
        now = time.monotonic()
        is_next = self._done_bytes * NUM_LINES >= self._total_bytes * (self._num_lines + 1)
        is_done = self._done_bytes >= self._total_bytes
        if not (is_done or (is_next and now - self._last_line >= LINE_SECONDS)):
            return
        self._num_lines = self._done_bytes * NUM_LINES // max(self._total_bytes, 1)
        self._last_line = now
        rate = self._done_bytes / max(now - self._start, 1e-3)
        self._console.print(
            f"{self._name} {size(self._done_bytes)} of {size(self._total_bytes)} "
            f"({self._done_bytes / max(self._total_bytes, 1):.0%})  {size(rate)}/s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
