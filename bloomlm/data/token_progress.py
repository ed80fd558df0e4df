"""What is shown while texts are tokenised: a bar with tokens/s on a terminal, a line a minute anywhere else."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 60.0
"""Time between two lines where there is no terminal."""


class TokenProgress:
    """Shows how far a source has been tokenised.

    Args:
        name: name of the source.
        total_bytes: size of its files; None if that is not known.
        num_tokens: tokens that earlier runs have made.
        shown: whether anything is shown.
    """

    def __init__(self, name: str, total_bytes: int | None, *, num_tokens: int, shown: bool) -> None:
        self._name, self._total_bytes = name, total_bytes
        self._first_tokens = num_tokens
        self._console = Console(stderr=True, quiet=not shown)
        columns = (
            TextColumn("tokenising {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not (shown and self._console.is_terminal))
        self._task = self._bar.add_task(name, total=total_bytes, speed="")
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, num_tokens: int, num_bytes: int) -> None:
        """Show that so many tokens exist, and so many bytes of the files have been read."""
        now = time.monotonic()
        rate = (num_tokens - self._first_tokens) / max(now - self._start, 1e-3)
        speed = f"{rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=num_bytes, speed=speed)
        if not self._console.is_terminal and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            share = "" if not self._total_bytes else f" ({min(num_bytes / self._total_bytes, 1.0):.0%} of the files)"
            self._console.print(
                f"tokenising {self._name}: {num_tokens:,} tokens{share}, {speed}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
