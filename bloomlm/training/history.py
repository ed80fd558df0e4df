"""What a run has logged: trainer_state.json, which checkpoints carry, and metrics.jsonl, which grows line by line.

A run that goes on takes its history from the checkpoint; lines of metrics.jsonl after that step belong to work that
was lost and will be done again, so they are dropped and no step is there twice.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bloomlm.checkpoint.atomic import atomic_write
from bloomlm.errors import CheckpointError

STATE_FILE = "trainer_state.json"
METRICS_FILE = "metrics.jsonl"

Entry = dict[str, Any]


@dataclass(kw_only=True)
class History:
    """The log of a run, in the shape that transformers and PaddleNLP write."""

    max_steps: int
    """Steps of the whole run."""
    num_train_epochs: float
    """Passes through the examples that these are."""
    global_step: int = 0
    """Steps done."""
    epoch: float = 0.0
    """Epochs done."""
    best_metric: float | None = None
    """Value of the metric that decides which checkpoint is best."""
    best_model_checkpoint: str | None = None
    """Name of that checkpoint's directory."""
    log_history: list[Entry] = field(default_factory=list)
    """Every entry of metrics, oldest first."""

    def note_best(self, value: float, step: int, *, greater_is_better: bool) -> bool:
        """Take a step as the best if its metric is better than that of all before; NaN never is."""
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
        """Go on with the log of a checkpoint; how long the run is to be stays as this run says.

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
    """metrics.jsonl, opened so that it continues a run's log after a step.

    Args:
        path: the file; may not be there yet.
        step: steps done; lines of later steps, and a last line cut off by a crash, are dropped.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _belongs_before(line, step)]
            atomic_write(path, "".join(line + "\n" for line in kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line, at once to be seen by who follows the file.

        Raises:
            CheckpointError: the disk is full, or the like.
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
    """The same value with NaN and infinities, which JSON has no numbers for, as null."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole, keys in order."""
    atomic_write(path, json.dumps(plain(values), indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _belongs_before(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
