"""Where a run's numbers go: metrics.jsonl, the screen, TensorBoard; at the end results files and the loss picture."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bloomlm.checkpoint.atomic import atomic_write
from bloomlm.training.history import METRICS_FILE, Entry, History, MetricsFile, plain, write_json
from bloomlm.training.loop import StepLog, TrainResult
from bloomlm.training.plot import draw_losses
from bloomlm.training.progress import ProgressDisplay
from bloomlm.training.step import StepResult

PICTURE_FILE = "loss.png"
TENSORBOARD_DIRECTORY = "runs"


class Reporter:
    """Writes down what happens in a run.

    Args:
        output_dir: of the run.
        history: the log so far; entries are added to it.
        console: where progress is shown.
        show_bar: whether a terminal gets a bar instead of lines.
        use_tensorboard: whether event files are written to output_dir/runs.
        writes_files: False on ranks whose numbers another one writes.
    """

    def __init__(
        self,
        output_dir: Path,
        history: History,
        console: Console,
        *,
        show_bar: bool,
        use_tensorboard: bool,
        writes_files: bool = True,
    ) -> None:
        self.output_dir = output_dir
        self.history = history
        self._metrics = MetricsFile(output_dir / METRICS_FILE, step=history.global_step) if writes_files else None
        self._display = ProgressDisplay(
            console, max_steps=history.max_steps, step=history.global_step, show_bar=show_bar
        )
        self._tensorboard = None
        if use_tensorboard and writes_files:
            self._tensorboard = _open_tensorboard(output_dir, history.global_step)

    def on_step(self, result: StepResult) -> None:
        """Note a step; one that left the weights as they were has a line of its own."""
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
        self._add_scalars("train", entry)

    def add_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics (eval_...) of an evaluation after the step at hand."""
        entry: Entry = {"step": self.history.global_step, "epoch": round(self.history.epoch, 4), **metrics}
        self._add(entry)
        self._display.show_evaluation(entry)
        self._add_scalars("eval", entry)

    def say(self, message: str) -> None:
        """Show a line."""
        self._display.say(message)

    def close(self) -> None:
        """End what is shown and close the files; may be called twice."""
        self._display.stop()
        if self._metrics is not None:
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _add(self, entry: Entry) -> None:
        if self._metrics is not None:
            self._metrics.write(entry)
        self.history.log_history.append(plain(entry))

    def _add_scalars(self, group: str, entry: Entry) -> None:
        if self._tensorboard is None:
            return
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                self._tensorboard.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, entry["step"])
        self._tensorboard.flush()


def train_metrics(result: TrainResult, epoch: float, num_examples: int) -> dict[str, float]:
    """The numbers of train_results.json, under the names that transformers and PaddleNLP give them.

    Args:
        result: of the loop.
        epoch: epochs done.
        num_examples: examples this process learned from, an example counting in each epoch.
    """
    seconds = result.train_seconds
    per_second = 1 / seconds if seconds > 0 else 0.0
    return {
        "epoch": round(epoch, 4),
        "train_loss": result.train_loss,
        "train_runtime": round(seconds, 4),
        "train_samples_per_second": round(num_examples * per_second, 3),
        "train_steps_per_second": round(result.num_steps * per_second, 3),
        "train_tokens_per_second": round(result.num_tokens * per_second, 1),
        "train_tokens": result.total_tokens,
        "train_steps": result.step,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def write_results(output_dir: Path, train: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> None:
    """Write train_results.json, eval_results.json and, both joined, all_results.json."""
    for name, values in (("train", train), ("eval", evaluation)):
        if values is not None:
            write_json(output_dir / f"{name}_results.json", values)
    write_json(output_dir / "all_results.json", {**(train or {}), **(evaluation or {})})


def read_train_results(output_dir: Path) -> dict[str, Any] | None:
    """The content of train_results.json; None where there is none that can be read."""
    try:
        values = json.loads((output_dir / "train_results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_picture(history: History, output_dir: Path, title: str) -> Path | None:
    """Draw loss.png; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    path = output_dir / PICTURE_FILE
    draw_losses(history.log_history, path, title)
    return path


def write_generations(path: Path, rows: list[dict[str, str]]) -> None:
    """Write infer_result.json: one JSON object a line, as PaddleNLP's script did."""
    atomic_write(path, "".join(json_line(row) for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON, letters of all scripts as they are."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _open_tensorboard(output_dir: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # an extra

    # purge_step: what an interrupted run drew after its last checkpoint is taken back
    return SummaryWriter(str(output_dir / TENSORBOARD_DIRECTORY), purge_step=step + 1 if step else None)
