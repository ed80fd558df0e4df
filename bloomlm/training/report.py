"""Where the numbers of a run go while it runs: metrics.jsonl, the screen and trackers."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bloomlm.errors import CheckpointError, format_bytes
from bloomlm.files.atomic import atomic_write
from bloomlm.files.json_text import parse_json
from bloomlm.training.reporters import Trackers
from bloomlm.training.results import Entry, History, StepLog, StepResult, plain

METRICS_FILE = "metrics.jsonl"


class Reporter:
    """Writes and shows the numbers of a run.

    Args:
        output_dir: directory of the run.
        history: the log so far, to which entries are added.
        console: where progress is shown.
        show_bar: whether a terminal shows a bar instead of lines.
        trackers: other programs that record the numbers.
        writes_files: whether this rank writes files.
    """

    def __init__(
        self,
        output_dir: Path,
        history: History,
        console: Console,
        *,
        show_bar: bool,
        trackers: Trackers | None = None,
        writes_files: bool = True,
    ) -> None:
        self.output_dir = output_dir
        self.history = history
        self._metrics = MetricsFile(output_dir / METRICS_FILE, step=history.global_step) if writes_files else None
        self._display = ProgressDisplay(
            console, max_steps=history.max_steps, step=history.global_step, show_bar=show_bar
        )
        self._trackers = trackers

    def on_step(self, result: StepResult) -> None:
        """Record a step; a step that did not update the weights gets an entry in the log."""
        self.history.global_step = result.step
        self._display.advance(result.step)
        if result.skipped is not None:
            self._add({"step": result.step, "skipped": result.skipped})

    def on_log(self, log: StepLog) -> None:
        """Write the numbers since the last log."""
        self.history.epoch = log.epoch
        entry: Entry = {
            "step": log.step,
            "epoch": round(log.epoch, 4),
            "loss": log.loss,
            **log.metrics,
            "learning_rate": log.learning_rate,
            "grad_norm": log.grad_norm,
            "tokens_per_second": round(log.tokens_per_second, 1),
            "supervised_tokens": log.num_supervised_tokens,
            "total_tokens": log.total_tokens,
            "peak_memory_bytes": log.peak_memory_bytes,
            "eta_seconds": round(log.eta_seconds, 1),
            "skipped_steps": log.skipped_steps,
        }
        if log.loss_scale is not None:
            entry["loss_scale"] = log.loss_scale
        self._add(entry)
        self._display.show_log(entry)
        self._track("train", entry)

    def add_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics (eval_...) of the evaluation after the current step."""
        entry: Entry = {"step": self.history.global_step, "epoch": round(self.history.epoch, 4), **metrics}
        self._add(entry)
        self._display.show_evaluation(entry)
        self._track("eval", entry)

    def say(self, message: str) -> None:
        """Show a line."""
        self._display.say(message)

    def close(self) -> None:
        """End the display and close the files; may be called repeatedly."""
        self._display.stop()
        if self._metrics is not None:
            self._metrics.close()
        if self._trackers is not None:
            self._trackers.close()

    def _add(self, entry: Entry) -> None:
        if self._metrics is not None:
            self._metrics.write(entry)
        self.history.log_history.append(plain(entry))

    def _track(self, group: str, entry: Entry) -> None:
        if self._trackers is not None:
            self._trackers.log(entry["step"], group, entry)


class MetricsFile:
    """metrics.jsonl, opened to continue after a step.

    Lines of later steps belong to work that was lost and will be done again. They are dropped, and so is a last line
    that a crash cut off; so no step occurs twice.

    Args:
        path: the file, which need not exist.
        step: number of steps done.

    Raises:
        CheckpointError: it cannot be written.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        try:
            if path.exists():
                if not path.is_file():
                    raise OSError(errno.EINVAL, "it is not a file", str(path))
                kept = [line for line in path.read_bytes().split(b"\n") if _belongs_before(line, step)]
                atomic_write(path, b"".join(line + b"\n" for line in kept))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read and written: {error}; checkpoints are unchanged") from error

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line and flush it, so that others can follow the file; raises CheckpointError if it cannot."""
        try:
            self._file.write(json.dumps(plain(entry)) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"{self._file.name} cannot be written: {error}; checkpoints are unchanged") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressDisplay:
    """Shows a progress bar with the newest numbers on a terminal, and lines anywhere else.

    Args:
        console: where to show them.
        max_steps: number of steps of the whole run.
        step: number of steps that are done already.
        show_bar: False shows lines on a terminal too.
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
        """Move the bar to a step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show_log(self, entry: Mapping[str, Any]) -> None:
        """Show an entry of the log."""
        if self._progress is not None:
            numbers = (
                f"loss {entry['loss']:.4f}{_rewards(entry)}  lr {entry['learning_rate']:.2e}  "
                f"{entry['tokens_per_second']:,.0f} tokens/s  ETA {duration(entry['eta_seconds'])}"
            )
            self._progress.update(self._task, numbers=numbers)
        else:
            self.say(log_line(entry, self._max_steps))

    def show_evaluation(self, entry: Mapping[str, Any]) -> None:
        """Show an evaluation as a line, above the bar if there is one."""
        self.say(evaluation_line(entry, self._max_steps))

    def say(self, message: str) -> None:
        """Show a line."""
        # soft_wrap keeps a line whole in a file, which has no width
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def log_line(entry: Mapping[str, Any], max_steps: int) -> str:
    """One line of training numbers."""
    skipped = f"  {entry['skipped_steps']} skipped" if entry["skipped_steps"] else ""
    return (
        f"step {entry['step']}/{max_steps}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}{_rewards(entry)}  "
        f"lr {entry['learning_rate']:.2e}  grad {entry['grad_norm']:.2f}  "
        f"{entry['tokens_per_second']:,.0f} tokens/s  {format_bytes(entry['peak_memory_bytes'])}  "
        f"ETA {duration(entry['eta_seconds'])}{skipped}"
    )


def _rewards(entry: Mapping[str, Any]) -> str:
    """What preference tuning shows beside the loss."""
    shown = {"margin": entry.get("rewards_margin"), "accuracy": entry.get("rewards_accuracy")}
    return "".join(f"  {name} {value:.3f}" for name, value in shown.items() if value is not None)


def evaluation_line(entry: Mapping[str, Any], max_steps: int) -> str:
    """One line of evaluation numbers, without those of each source and language, which may be many."""
    shown = [
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in entry.items()
        if name.startswith("eval_")
        and isinstance(value, float)
        and "/" not in name
        and not name.endswith(("_runtime", "_per_second"))
    ]
    return f"step {entry['step']}/{max_steps}  evaluation  " + "  ".join(shown)


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: 0:03:21."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _belongs_before(line: bytes, step: int) -> bool:
    try:
        return int(parse_json(line)["step"]) <= step
    except (ValueError, KeyError, TypeError, OverflowError):
        return False
