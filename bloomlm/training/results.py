"""The numbers of a run: what a step, the loop and the whole run report, the log, and the files of results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bloomlm.errors import CheckpointError
from bloomlm.files.atomic import atomic_write
from bloomlm.files.json_text import read_object

STATE_FILE = "trainer_state.json"
TRAIN_RESULTS_FILE = "train_results.json"
EVAL_RESULTS_FILE = "eval_results.json"
ALL_RESULTS_FILE = "all_results.json"
ANSWERS_FILE = "infer_result.json"

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    step: int
    """Number of steps done, this one included."""
    loss: float
    """Mean over the terms of the step: its supervised tokens, or what the objective says."""
    learning_rate: float
    """Learning rate of this update."""
    grad_norm: float
    """Norm of all gradients before clipping, without the loss scale."""
    num_tokens: int
    """Number of tokens."""
    num_supervised_tokens: int
    """Number of tokens that have a label."""
    num_terms: float
    """Number of terms of the loss."""
    sums: Mapping[str, float]
    """The objective's sums, from which it computes its metrics."""
    skipped: str | None
    """Why the weights were not updated; None if they were."""
    step_seconds: float
    """Wall time of the step."""


@dataclass(kw_only=True)
class Totals:
    """Sums over steps; saved in checkpoints."""

    loss: float = 0.0
    """Sum of the losses of all terms, over the steps that updated the weights."""
    loss_terms: float = 0
    """Number of terms in that sum."""
    sums: dict[str, float] = field(default_factory=dict)
    """The objective's sums, over the same steps."""
    tokens: int = 0
    supervised_tokens: int = 0
    """Number of tokens that have a label, over all steps."""
    skipped_steps: int = 0
    """Number of steps that did not update the weights."""

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self.tokens += result.num_tokens
        self.supervised_tokens += result.num_supervised_tokens
        if result.skipped is None:
            self.loss += result.loss * result.num_terms
            self.loss_terms += result.num_terms
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in result.sums.items()}
        else:
            self.skipped_steps += 1

    @property
    def mean_loss(self) -> float:
        """Mean loss per term; NaN if there is none."""
        return self.loss / self.loss_terms if self.loss_terms else math.nan


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """An entry of the log. Sums and means are over the steps since the last entry."""

    step: int
    """Number of steps done."""
    epoch: float
    """Number of epochs done."""
    loss: float
    """Mean over the terms of steps that updated the weights; NaN if none did."""
    learning_rate: float
    """Learning rate of the last step."""
    grad_norm: float
    """Norm of the gradients of the last step before clipping."""
    tokens_per_second: float
    """Speed in steps, without the time of evaluating and saving."""
    num_supervised_tokens: int
    """Number of tokens that have a label."""
    total_tokens: int
    """Number of tokens since the run began."""
    skipped_steps: int
    """Number of steps that did not update the weights."""
    loss_scale: float | None
    """Loss scale of fp16; None in other formats."""
    peak_memory_bytes: int
    """Largest use so far of the GPU's memory, or on a CPU of the memory of the process."""
    eta_seconds: float
    """Time of the remaining steps at this speed."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The objective's metrics over the steps that updated the weights."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How the loop ended."""

    step: int
    """Number of steps done since the run began."""
    interrupted: bool
    """Whether SIGTERM ended the loop after a step that was saved; then exit with SIGTERM_EXIT_CODE."""
    train_loss: float
    """Mean over the terms of the whole run."""
    train_seconds: float
    """Time that this process spent in steps."""
    num_steps: int
    """Number of steps of this process."""
    num_tokens: int
    """Number of tokens in the steps of this process."""
    total_tokens: int
    """Number of tokens since the run began."""
    peak_memory_bytes: int
    """As in StepLog."""


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run produced, and where it is."""

    output_dir: Path
    """Holds the model or adapter, results and checkpoints."""
    step: int
    """Number of steps done since the run began."""
    interrupted: bool
    """Whether SIGTERM ended the run; then everything is saved, and the same call resumes it."""
    train_metrics: dict[str, Any] | None = None
    """The content of train_results.json; None if the run did not train."""
    eval_metrics: dict[str, Any] | None = None
    """The content of eval_results.json, which describes the final model; None if it was not evaluated."""
    best_checkpoint: Path | None = None
    """The checkpoint with the best evaluation; None if there is none."""
    merged_path: Path | None = None
    """The model with its adapter merged into it; None unless merge_weights was given."""
    picture_path: Path | None = None
    """loss.png, or learning_rate.png of a range test; None if it could not be drawn."""
    suggested_learning_rate: float | None = None
    """What find_learning_rate suggests; None if no rate lowered the loss, and for other runs."""


@dataclass(kw_only=True)
class History:
    """The log of a run, with the fields of trainer_state.json that transformers' Trainer writes."""

    max_steps: int
    """Number of steps of the whole run."""
    num_train_epochs: float
    """Number of passes through the examples in these steps."""
    global_step: int = 0
    """Number of steps done."""
    epoch: float = 0.0
    """Number of epochs done."""
    best_metric: float | None = None
    """Best value so far of the metric that chooses the best checkpoint."""
    best_model_checkpoint: str | None = None
    """Name of the directory of the best checkpoint."""
    log_history: list[Entry] = field(default_factory=list)
    """All entries, oldest first."""

    def note_best(self, value: float, step: int, *, greater_is_better: bool) -> bool:
        """Record a step as the best if its metric is better than all earlier ones, and return whether it is."""
        better = self.best_metric is None or (
            value > self.best_metric if greater_is_better else value < self.best_metric
        )
        if math.isnan(value) or not better:
            return False
        self.best_metric, self.best_model_checkpoint = value, f"checkpoint-{step}"
        return True

    def evaluation_of(self, step: int) -> Entry | None:
        """The log entry of the evaluation after a step; None if there was none."""
        return next((e for e in reversed(self.log_history) if e["step"] == step and "eval_loss" in e), None)

    def write(self, directory: Path) -> None:
        """Write trainer_state.json."""
        values = {**vars(self), "is_local_process_zero": True, "is_world_process_zero": True}
        write_json(directory / STATE_FILE, values)

    def read_logged(self, checkpoint: Path) -> None:
        """Take over the log of a checkpoint, but not the length of its run.

        Raises:
            CheckpointError: trainer_state.json cannot be read.
        """
        path = checkpoint / STATE_FILE
        try:
            values = read_object(path)
            logged = {name: values[name] for name in vars(self) if name not in ("max_steps", "num_train_epochs")}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error!r}; remove {checkpoint} to resume from an earlier checkpoint"
            ) from error
        vars(self).update(logged)


def plain(value: Any) -> Any:
    """A copy of a value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, with sorted keys."""
    atomic_write(path, json.dumps(plain(values), indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def train_metrics(result: TrainResult, epoch: float, num_examples: int) -> dict[str, float]:
    """The numbers of train_results.json, by the names that transformers' Trainer uses.

    `num_examples` counts the examples that this process learned from, once for every epoch.
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
        return read_object(output_dir / TRAIN_RESULTS_FILE)
    except (OSError, ValueError):
        return None


def write_answers(output_dir: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write infer_result.json: one JSON object on each line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_write(output_dir / ANSWERS_FILE, "".join(lines))
