"""What a run shows while it goes: a bar on a terminal, plain lines anywhere else."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressDisplay:
    """A bar with the newest numbers, or a line for each entry of the log.

    Args:
        console: where to; a terminal gets the bar.
        max_steps: steps of the whole run.
        step: steps done before.
        show_bar: False gives lines on a terminal too.
    """

    def __init__(self, console: Console, *, max_steps: int, step: int = 0, show_bar: bool = True) -> None:
        self._console = console
        self._max_steps = max_steps
        self._progress: Progress | None = None
        if show_bar and console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("training", total=max_steps, completed=step, numbers="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Note a step that is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show_log(self, entry: Mapping[str, Any]) -> None:
        """Show an entry of training."""
        if self._progress is not None:
            numbers = (
                f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  "
                f"{entry['tokens_per_second']:,.0f} tokens/s  ETA {duration(entry['eta_seconds'])}"
            )
            self._progress.update(self._task, numbers=numbers)
        else:
            self._print(log_line(entry, self._max_steps))

    def show_evaluation(self, entry: Mapping[str, Any]) -> None:
        """Show an evaluation; a line above the bar, where there is one."""
        self._print(evaluation_line(entry, self._max_steps))

    def say(self, message: str) -> None:
        """Show a line."""
        self._print(message)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, line: str) -> None:
        # soft_wrap: a line stays one line where the output is a file, which has no width
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def log_line(entry: Mapping[str, Any], max_steps: int) -> str:
    """One line of training numbers."""
    skipped = f"  {entry['skipped_steps']} skipped" if entry["skipped_steps"] else ""
    return (
        f"step {entry['step']}/{max_steps}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}  "
        f"lr {entry['learning_rate']:.2e}  grad {entry['grad_norm']:.2f}  "
        f"{entry['tokens_per_second']:,.0f} tokens/s  {size(entry['peak_memory_bytes'])}  "
        f"ETA {duration(entry['eta_seconds'])}{skipped}"
    )


def evaluation_line(entry: Mapping[str, Any], max_steps: int) -> str:
    """One line of evaluation numbers."""
    shown = [
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in entry.items()
        if name.startswith("eval_") and isinstance(value, float) and not name.endswith(("_runtime", "_per_second"))
    ]
    return f"step {entry['step']}/{max_steps}  evaluation  " + "  ".join(shown)


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: 0:03:21."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def size(num_bytes: float) -> str:
    """A size in the unit that fits: 1.2 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
