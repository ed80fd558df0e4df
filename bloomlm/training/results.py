"""What a step, an interval of the log, an evaluation, the loop and a whole run report, as values."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the step's supervised tokens."""
    learning_rate: float
    """Of this update."""
    grad_norm: float
    """Global norm before clipping, without the loss scale."""
    num_tokens: int
    """Tokens that went through the model."""
    num_supervised_tokens: int
    """Those of them that had a label."""
    skipped: str | None
    """Why the weights were left as they were; None: they were updated."""
    step_seconds: float
    """Wall time."""


@dataclass(kw_only=True)
class Totals:
    """Sums over steps; saved in checkpoints."""

    loss: float = 0.0
    """Sum over the supervised tokens of the steps that updated the weights."""
    loss_tokens: int = 0
    """Number of those tokens."""
    tokens: int = 0
    """Tokens through the model."""
    supervised_tokens: int = 0
    """Those with a label."""
    skipped_steps: int = 0
    """Steps that left the weights as they were."""

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self.tokens += result.num_tokens
        self.supervised_tokens += result.num_supervised_tokens
        if result.skipped is None:
            self.loss += result.loss * result.num_supervised_tokens
            self.loss_tokens += result.num_supervised_tokens
        else:
            self.skipped_steps += 1

    @property
    def mean_loss(self) -> float:
        """Per supervised token; NaN without any."""
        return self.loss / self.loss_tokens if self.loss_tokens else math.nan


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """An entry of the log; sums and means are over the steps since the last entry."""

    step: int
    """Steps done."""
    epoch: float
    """Epochs done."""
    loss: float
    """Mean over supervised tokens of the steps that updated the weights; NaN where none did."""
    learning_rate: float
    """Of the last step."""
    grad_norm: float
    """Of the last step, before clipping."""
    tokens_per_second: float
    """Tokens through the model per second in steps; evaluating and saving are not counted."""
    num_supervised_tokens: int
    """Tokens with a label."""
    total_tokens: int
    """Tokens through the model since the run began."""
    skipped_steps: int
    """Steps that left the weights as they were."""
    loss_scale: float | None
    """In fp16; None in other formats."""
    peak_memory_bytes: int
    """Largest use so far: the accelerator's memory, or the process's on a CPU."""
    eta_seconds: float
    """Time that the remaining steps take at this speed."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How the loop ended."""

    step: int
    """Steps done since the run began."""
    interrupted: bool
    """SIGTERM came: the current step was finished and saved; exit with SIGTERM_EXIT_CODE."""
    train_loss: float
    """Mean over the supervised tokens of the whole run."""
    train_seconds: float
    """Time in steps, of this process."""
    num_steps: int
    """Steps of this process."""
    num_tokens: int
    """Tokens through the model, of this process."""
    total_tokens: int
    """Tokens through the model since the run began."""
    peak_memory_bytes: int
    """As in StepLog."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """How well a model predicts the tokens that have a label."""

    loss: float
    """Mean cross entropy, without label smoothing."""
    token_accuracy: float
    """Fraction of the tokens to which the model gives the highest probability."""
    num_supervised_tokens: int
    """Tokens with a label."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run produced, and where it lies."""

    output_dir: Path
    """Holds the trained model or adapter, results and checkpoints."""
    step: int
    """Steps done since the run began."""
    interrupted: bool
    """SIGTERM came: everything is saved, and the same call resumes the run."""
    train_metrics: dict[str, Any] | None
    """The content of train_results.json; None without training."""
    eval_metrics: dict[str, Any] | None
    """The content of eval_results.json, of the final model; None without evaluation."""
    best_checkpoint: Path | None
    """The checkpoint with the best evaluation; None without one."""
    merged_path: Path | None
    """The model with its adapter merged in; None unless merge_weights."""
    picture_path: Path | None
    """loss.png; None where it could not be drawn."""
