"""The numbers of a run on disk: its log (trainer_state.json and metrics.jsonl), and the files of results at its end.

A run that resumes takes its log from the checkpoint. Lines of metrics.jsonl after that step belong to work that was
lost and will be done again, so they are dropped and no step occurs twice.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bloomlm.errors import CheckpointError
from bloomlm.files.atomic import atomic_write
from bloomlm.training.results import TrainResult

STATE_FILE = "trainer_state.json"
METRICS_FILE = "metrics.jsonl"
TRAIN_RESULTS_FILE = "train_results.json"
EVAL_RESULTS_FILE = "eval_results.json"
ALL_RESULTS_FILE = "all_results.json"
ANSWERS_FILE = "infer_result.json"

Entry = dict[str, Any]


@dataclass(kw_only=True)
class History:
    """The log of a run, in the shape that transformers' Trainer writes."""

    max_steps: int
    """Steps of the whole run."""
    num_train_epochs: float
    """Passes through the examples in these steps."""
    global_step: int = 0
    """Steps done."""
    epoch: float = 0.0
    """Epochs done."""
    best_metric: float | None = None
    """The best value so far of the metric that decides which checkpoint is the best."""
    best_model_checkpoint: str | None = None
    """Name of the best checkpoint's directory."""
    log_history: list[Entry] = field(default_factory=list)
    """All entries, oldest first."""

    def note_best(self, value: float, step: int, *, greater_is_better: bool) -> bool:
        """Take a step as the best if its metric is better than that of all steps before; NaN never is."""
        better = self.best_metric is None or (
            value > self.best_metric if greater_is_better else value < self.best_metric
        )
        if math.isnan(value) or not better:
            return False
        self.best_metric, self.best_model_checkpoint = value, f"checkpoint-{step}"
        return True

    def evaluation_of(self, step: int) -> Entry | None:
        """The entry of the evaluation after a step; None if there was none."""
        return next((e for e in reversed(self.log_history) if e["step"] == step and "eval_loss" in e), None)

    def write(self, directory: Path) -> None:
        """Write trainer_state.json."""
        values = {**vars(self), "is_local_process_zero": True, "is_world_process_zero": True}
        write_json(directory / STATE_FILE, values)

    def read_logged(self, checkpoint: Path) -> None:
        """Continue the log of a checkpoint; the length of the run stays that of this run.

        Raises:
            CheckpointError: its trainer_state.json cannot be read.
        """
        path = checkpoint / STATE_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            logged = {name: values[name] for name in vars(self) if name not in ("max_steps", "num_train_epochs")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error!r}; remove {checkpoint} to go on before it"
            ) from error
        vars(self).update(logged)


class MetricsFile:
    """metrics.jsonl, opened so that it continues the log of a run after a step.

    Args:
        path: the file, which need not exist.
        step: steps done; lines of later steps, and a last line that a crash cut off, are dropped.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _belongs_before(line, step)]
            atomic_write(path, "".join(line + "\n" for line in kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line and flush it, so that others can follow the file.

        Raises:
            CheckpointError: the file cannot be written, for example because the disk is full.
        """
        try:
            self._file.write(json.dumps(plain(entry)) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"{self._file.name} cannot be written: {error}; checkpoints are untouched") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def plain(value: Any) -> Any:
    """The same value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, keys sorted."""
    atomic_write(path, json.dumps(plain(values), indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def train_metrics(result: TrainResult, epoch: float, num_examples: int) -> dict[str, float]:
    """The numbers of train_results.json, under the names that transformers' Trainer gives them.

    Args:
        result: of the loop.
        epoch: epochs done.
        num_examples: examples this process learned from, each counted once for every epoch.
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
    """Write train_results.json, eval_results.json and, with the numbers of both, all_results.json."""
    for name, values in ((TRAIN_RESULTS_FILE, train), (EVAL_RESULTS_FILE, evaluation)):
        if values is not None:
            write_json(output_dir / name, values)
    write_json(output_dir / ALL_RESULTS_FILE, {**(train or {}), **(evaluation or {})})


def read_train_results(output_dir: Path) -> dict[str, Any] | None:
    """The content of train_results.json; None if it does not exist or cannot be read."""
    try:
        values = json.loads((output_dir / TRAIN_RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_answers(output_dir: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write infer_result.json: one JSON object on each line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_write(output_dir / ANSWERS_FILE, "".join(lines))


def _belongs_before(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
