"""The learning-rate range test: training on rates that rise until the loss diverges, to choose the rate of a run.

Source: Smith, Cyclical learning rates for training neural networks, https://arxiv.org/abs/1506.01186, section 3.3; with
rates that rise exponentially, and the suggestion of a tenth of the rate of the lowest loss, as in fastai's lr_find.
"""

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from bloomlm.checkpoint.main_rank import on_main
from bloomlm.files.atomic import atomic_write
from bloomlm.files.picture import has_matplotlib, new_figure, png_of, tidy
from bloomlm.parallel.mesh import Mesh
from bloomlm.training.config import TrainingConfig, default_of
from bloomlm.training.optimizer import Schedule, ScheduleConfig
from bloomlm.training.results import FinetuneResult
from bloomlm.training.run_plan import RunPlan, TrainingPlan
from bloomlm.training.setup import RunSetup, build_trainer, load_batches, set_up
from bloomlm.training.summary import run_title, show_notices, smoothed

LOWEST, HIGHEST = 1e-7, 1.0
MOST_STEPS = 100
PICTURE_FILE = "learning_rate.png"
_WINDOW = 9
"""Losses of so many steps in a row are averaged, because batches differ."""
_DIVERGED = 2.0
"""The test ends when the averaged loss is this many times the lowest one."""


class RisingSchedule(Schedule):
    """Rates that rise from LOWEST to the peak by the same factor at each step."""

    def __call__(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return LOWEST * (self.config.learning_rate / LOWEST) ** (step / max(1, self.max_steps - 1))


class RisingRates(ScheduleConfig):
    """The rates of a range test."""

    def over(self, max_steps: int) -> RisingSchedule:
        """The schedule of a test of this many steps."""
        return RisingSchedule(self, max_steps)


@dataclass(frozen=True)
class RangeTest:
    """What a range test found."""

    rates: tuple[float, ...]
    """Learning rate of each step."""
    losses: tuple[float, ...]
    """Loss of each step, before its update."""

    @property
    def averages(self) -> list[float]:
        """The mean of each loss and its neighbours."""
        return smoothed(self.losses, _WINDOW)

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate with the lowest averaged loss; None if the loss was lowest at the beginning."""
        averages = self.averages
        best = min(range(len(averages)), key=averages.__getitem__, default=0)
        return self.rates[best] / 10 if best >= _WINDOW else None


def find_learning_rate(config: TrainingConfig, plan: RunPlan, console: Console, mesh: Mesh) -> FinetuneResult:
    """Run a range test instead of fine-tuning; writes learning_rate.png to output_dir, and nothing else.

    Args:
        config: flags of a run as they were given.
        plan: the run. Its learning rate, schedule, checkpoints and evaluations are left out.
        console: where progress is shown.
        mesh: the ranks, all of which must call this.

    Raises:
        ConfigError, CheckpointError, DataError: see finetune.
    """
    show_notices(plan, None, console)
    setup = set_up(plan, None, console, mesh)
    assert setup.plan.training is not None
    found = run_range_test(setup, setup.plan.training)
    directory = plan.output.directory
    picture = on_main(lambda: _write_picture(found, directory, run_title(setup.plan)), mesh)
    for line in _lines(found, config, picture):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return FinetuneResult(
        output_dir=directory,
        step=len(found.rates),
        interrupted=False,
        picture_path=picture,
        suggested_learning_rate=found.suggestion,
    )


def run_range_test(setup: RunSetup, training: TrainingPlan) -> RangeTest:
    """Train on rising rates until the loss diverges, for at most MOST_STEPS; the model is not usable afterwards."""
    assert setup.train_examples is not None
    plan, mesh = setup.plan, setup.mesh
    num_steps = min(MOST_STEPS, training.max_steps or MOST_STEPS)
    training = replace(training, schedule=RisingRates(learning_rate=HIGHEST), max_steps=num_steps)
    batches = load_batches(training, setup.train_examples, plan.objective, mesh)
    trainer = build_trainer(training, setup.model, batches, plan.objective, plan.precision, mesh)
    rates: list[float] = []
    losses: list[float] = []
    lowest = math.inf
    while trainer.step < num_steps:
        result = trainer.run_step()
        if result.skipped is not None and not math.isfinite(result.loss):
            break
        rates.append(result.learning_rate)
        losses.append(result.loss)
        average = statistics.fmean(losses[-_WINDOW:])
        if len(losses) >= _WINDOW:
            lowest = min(lowest, average)
        if average > _DIVERGED * lowest:
            break
    return RangeTest(tuple(rates), tuple(losses))


def _lines(found: RangeTest, config: TrainingConfig, picture: Path | None) -> list[str]:
    lines = [f"learning rates up to {found.rates[-1]:.1e} in {len(found.rates)} steps"] if found.rates else []
    if picture is not None:
        lines.append(f"picture in {picture}")
    if found.suggestion is None:
        return [*lines, "no learning rate lowered the loss; give more steps (--max_steps), or larger batches"]
    command = shlex.join(["bloomlm", "finetune", *_words(config), "--learning_rate", f"{found.suggestion:.1e}"])
    return [*lines, f"suggested learning rate: {found.suggestion:.1e}", f"  {command}"]


def _words(config: TrainingConfig) -> list[str]:
    """The flags that differ from their defaults, apart from those that the test replaces."""
    words: list[str] = []
    for name, value in asdict(config).items():
        if name not in ("find_learning_rate", "learning_rate") and value != default_of(name):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name}"] if value is True else [f"--{name}", text]
    return words


def _write_picture(found: RangeTest, directory: Path, title: str) -> Path | None:
    """Draw the losses over the rates; None if matplotlib is not installed."""
    if not (has_matplotlib() and found.rates):
        return None
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="#2a6fb0", alpha=0.3, linewidth=0.8, label="a step")
    axes.plot(found.rates, found.averages, color="#2a6fb0", linewidth=1.8, label=f"mean of {_WINDOW} steps")
    if found.suggestion is not None:
        axes.axvline(found.suggestion, color="#c0504d", linestyle="--", label=f"suggested: {found.suggestion:.1e}")
    axes.set_ylim(*_bounds(found.averages))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss in training")
    tidy(axes)
    axes.legend(frameon=False, loc="lower left")  # the losses begin high
    figure.suptitle(title, fontsize=11)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PICTURE_FILE
    atomic_write(path, png_of(figure))
    return path


def _bounds(averages: Sequence[float]) -> tuple[float, float]:
    """Limits of the axis: the losses up to the divergence, whose top would flatten the rest."""
    lowest, first = min(averages), averages[0]
    margin = max(first - lowest, 0.01 * first)
    return lowest - 0.2 * margin, first + margin
