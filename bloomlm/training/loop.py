"""The loop around the steps: when to log, evaluate and save, and how a run ends.

What logging, evaluating and saving mean is the callbacks' business; they may use the trainer, which is at rest.
"""

import math
import resource
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch

from bloomlm.data.loader import Batch
from bloomlm.errors import TrainingError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.parallel.data_parallel import reshard
from bloomlm.parallel.launch import agreed
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import tensor_parallel_group
from bloomlm.parallel.vocabulary_scores import score_tokens
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepResult, Totals, Trainer

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""What a process should exit with after TrainResult.interrupted."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run is and when its callbacks are called."""

    max_steps: int
    """Steps of the whole run; step.steps_per_epoch turns epochs into it."""
    logging_steps: int = 500
    """Call on_log after every so many steps, and after the last."""
    eval_steps: int | None = None
    """Call on_evaluate after every so many steps, and after the last; None: never."""
    save_steps: int | None = 500
    """Call on_save after every so many steps, and after the last; None: only when SIGTERM comes."""


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """What on_log receives; sums and means are over the steps since the last log."""

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
    """fp16's; None in other formats."""
    peak_memory_bytes: int
    """Largest use so far: the accelerator's memory, or the process's on a CPU."""
    eta_seconds: float
    """Time in steps that is left at this speed."""


class Callbacks(Protocol):
    """What happens between steps. After one step they are called in this order."""

    def on_step(self, result: StepResult) -> None:
        """After every step."""
        ...

    def on_log(self, log: StepLog) -> None:
        """After every logging_steps."""
        ...

    def on_evaluate(self, step: int) -> None:
        """After every eval_steps."""
        ...

    def on_save(self, step: int) -> None:
        """After every save_steps and on SIGTERM: write checkpoint-STEP."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Steps done since the run began."""
    interrupted: bool
    """SIGTERM came: the step at hand was finished and saved; exit with SIGTERM_EXIT_CODE."""
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


def train(trainer: Trainer, config: LoopConfig, callbacks: Callbacks) -> TrainResult:
    """Run the steps that are left, to config.max_steps or SIGTERM.

    Args:
        trainer: fresh, or after load_state.
        config: when to call what.
        callbacks: log, evaluate, save.

    Raises:
        TrainingError: see Trainer.run_step.
    """
    speed, run = _Stopwatch(), _Stopwatch()
    with sigterm_requests() as requests:
        stops = False
        while trainer.step < config.max_steps and not stops:
            result = trainer.run_step()
            speed.add(result)
            run.add(result)
            callbacks.on_step(result)
            if _due(trainer.step, config.logging_steps, config.max_steps):
                callbacks.on_log(_step_log(trainer, result, speed, config.max_steps))
                trainer.window, speed = Totals(), _Stopwatch()
            if _due(trainer.step, config.eval_steps, config.max_steps):
                callbacks.on_evaluate(trainer.step)
            stops = agreed(bool(requests), trainer.mesh)
            if stops or _due(trainer.step, config.save_steps, config.max_steps):
                callbacks.on_save(trainer.step)
    return TrainResult(
        step=trainer.step,
        interrupted=stops and trainer.step < config.max_steps,
        train_loss=trainer.totals.mean_loss,
        train_seconds=run.seconds,
        num_steps=run.steps,
        num_tokens=run.tokens,
        total_tokens=trainer.totals.tokens,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
    )


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """How well a model predicts the tokens that have a label."""

    loss: float
    """Mean cross entropy, without label smoothing."""
    token_accuracy: float
    """Part of the tokens that the model holds to be the likeliest."""
    num_supervised_tokens: int
    """Tokens with a label."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate_loss(
    model: BloomForCausalLM, batches: Iterable[Batch], precision: Precision, mesh: Mesh = ALONE
) -> EvalResult:
    """Loss and token accuracy, each token counting once whatever batch it is in.

    Args:
        model: put into evaluation mode for the while.
        batches: at least one supervised token in all; an endless loader must be cut by the caller.
        precision: as in training.
        mesh: the ranks; each data-parallel one has its own batches, as many as the others. All get the same result.

    Raises:
        TrainingError: no batch holds a token with a label.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    num_correct, num_supervised_tokens = torch.zeros((), dtype=torch.int64, device=device), 0
    with torch.no_grad(), precision.autocast(device.type):
        for batch in batches:
            on_device = batch.to(device)
            hidden = model.transformer(on_device.tokens, Documents.packed(batch.lengths))
            embedding = model.transformer.word_embeddings
            score = score_tokens(
                hidden,
                embedding.weight,
                on_device.labels,
                weight_scale=embedding.weight_scale,
                ranks=tensor_parallel_group(model),
            )
            loss += score.loss
            num_correct += score.num_correct
            num_supervised_tokens += batch.num_supervised_tokens
    model.train(was_training)
    reshard(model)
    if mesh.degrees.dp > 1:
        sums = torch.stack([loss, num_correct.double(), loss.new_tensor(num_supervised_tokens)])
        loss, num_correct, tokens = mesh.sum_over(sums, ("dp_replicate", "dp_shard"))
        num_supervised_tokens = int(tokens)
    if num_supervised_tokens == 0:
        raise TrainingError("the evaluation examples have no token with a label; check the targets")
    return EvalResult(
        loss=float(loss) / num_supervised_tokens,
        token_accuracy=int(num_correct) / num_supervised_tokens,
        num_supervised_tokens=num_supervised_tokens,
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory use so far: what torch took of the accelerator, or the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


@contextmanager
def sigterm_requests() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes. A second SIGTERM acts as it did outside.

    Outside the main thread, where Python takes no signals, it stays empty.
    """
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def note(signal_number: int, frame: FrameType | None) -> None:
        requests.append(signal_number)
        signal.signal(signal.SIGTERM, previous)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield requests
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass(kw_only=True)
class _Stopwatch:
    """What this process did since it was started."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.tokens += result.num_tokens
        self.seconds += result.step_seconds


def _step_log(trainer: Trainer, result: StepResult, speed: _Stopwatch, max_steps: int) -> StepLog:
    return StepLog(
        step=trainer.step,
        epoch=trainer.epoch,
        loss=trainer.window.mean_loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        tokens_per_second=speed.tokens / speed.seconds,
        num_supervised_tokens=trainer.window.supervised_tokens,
        total_tokens=trainer.totals.tokens,
        skipped_steps=trainer.window.skipped_steps,
        loss_scale=None if trainer.loss_scale is None else trainer.loss_scale.value,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        eta_seconds=(max_steps - trainer.step) * speed.seconds / speed.steps,
    )


def _due(step: int, every: int | None, max_steps: int) -> bool:
    return every is not None and (step % every == 0 or step == max_steps)
