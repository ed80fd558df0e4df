"""The loop around the steps: when to log, evaluate and save, and how a run ends.

Callbacks do the logging, evaluating and saving. They are called between two steps and may use the trainer.
"""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch

from bloomlm.parallel.launch import agreed
from bloomlm.training.results import StepLog, StepResult, TrainResult
from bloomlm.training.step import Trainer

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a process after TrainResult.interrupted."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The length of a run, and the numbers of steps between calls of each callback, which also follow the last step."""

    max_steps: int
    """Steps of the whole run."""
    logging_steps: int = 500
    """Steps between two calls of on_log."""
    eval_steps: int | None = None
    """Steps between two calls of on_evaluate; None: never."""
    save_steps: int | None = 500
    """Steps between two calls of on_save; None: only after SIGTERM."""

    def saves_after(self, step: int) -> bool:
        """Whether on_save is called after a step without SIGTERM."""
        return _due(step, self.save_steps, self.max_steps)


class Callbacks(Protocol):
    """What happens between steps; after a step the methods are called in this order."""

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
        """After every save_steps, after SIGTERM, and where the run ends early: write checkpoint-STEP."""
        ...

    def ends_early(self) -> bool:
        """At the beginning and after every on_evaluate: whether the run is over, with the same answer on all ranks."""
        ...


def train(trainer: Trainer, config: LoopConfig, callbacks: Callbacks) -> TrainResult:
    """Run the remaining steps, until config.max_steps, callbacks.ends_early or SIGTERM.

    Raises:
        TrainingError: see Trainer.run_step.
    """
    speed, run = _Stopwatch(), _Stopwatch()
    with sigterm_requests() as requests:
        stops, is_over = False, callbacks.ends_early()
        while trainer.step < config.max_steps and not (stops or is_over):
            result = trainer.run_step()
            speed.add(result)
            run.add(result)
            callbacks.on_step(result)
            if _due(trainer.step, config.logging_steps, config.max_steps):
                callbacks.on_log(_step_log(trainer, result, speed, config.max_steps))
                trainer.start_window()
                speed = _Stopwatch()
            if _due(trainer.step, config.eval_steps, config.max_steps):
                callbacks.on_evaluate(trainer.step)
                is_over = callbacks.ends_early()
            stops = agreed(bool(requests), trainer.mesh)
            if stops or is_over or config.saves_after(trainer.step):
                callbacks.on_save(trainer.step)
    return TrainResult(
        step=trainer.step,
        interrupted=stops and not is_over and trainer.step < config.max_steps,
        train_loss=trainer.totals.mean_loss,
        train_seconds=run.seconds,
        num_steps=run.steps,
        num_tokens=run.tokens,
        total_tokens=trainer.totals.tokens,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory use so far: torch's memory on a GPU, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


@contextmanager
def sigterm_requests() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes. Repeats change nothing, so that they do not interrupt the saving.

    A rank often gets the signal twice: from Slurm, which signals every process of a step, and from its launcher.
    Outside the main thread, where Python handles no signals, the list stays empty.
    """
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def note(signal_number: int, frame: FrameType | None) -> None:
        requests.append(signal_number)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield requests
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass(kw_only=True)
class _Stopwatch:
    """Sums of steps, tokens and time."""

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
        metrics=trainer.objective.metrics(trainer.window.sums) if trainer.window.loss_terms else {},
    )


def _due(step: int, every: int | None, max_steps: int) -> bool:
    return every is not None and (step % every == 0 or step == max_steps)
