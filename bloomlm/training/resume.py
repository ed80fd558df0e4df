"""Resuming from a checkpoint of bloomlm or of another program.

From another program's checkpoint come the weights, AdamW's moments, step and loss scale, about which the user is told.
The order of the examples is that of bloomlm after the same number of steps.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bloomlm.adapters.base import Adapter, adapter_of
from bloomlm.checkpoint.formats import (
    ImportedRun,
    RecordedAdapter,
    find_foreign_run,
    foreign_adapter_kind,
    read_foreign_run,
    read_recorded_adapter,
)
from bloomlm.checkpoint.reader import open_reader, read_config
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.checkpoint.training_state import load_training_state
from bloomlm.errors import BloomlmError, CheckpointError, ConfigError, name_some
from bloomlm.model.shard import fill, own_part
from bloomlm.parallel.layout import global_tensor, own_bounds
from bloomlm.training.results import History
from bloomlm.training.run_plan import RunPlan
from bloomlm.training.step import Trainer

SAME_RATE = 1e-5
"""Relative difference of learning rates that rounding can explain."""


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """What a run resumes from; empty for a fresh run."""

    checkpoint: Path | None = None
    """Directory of the checkpoint."""
    imported: ImportedRun | None = None
    """Content of the checkpoint, if another program wrote it."""
    recorded_adapter: RecordedAdapter | None = None
    """Structure of an adapter that another program began; bloomlm's checkpoints record it too."""


def read_resume_point(plan: RunPlan, source: Path, checkpoint: Path | None) -> ResumePoint:
    """Read what a run resumes from, and check the plan against it.

    Args:
        plan: plan of the run.
        source: directory of the model to start from.
        checkpoint: checkpoint to resume from; None: a fresh run.

    Raises:
        ConfigError: flags contradict the checkpoint, or say how to read files that do not exist.
        CheckpointError: files of the checkpoint are missing or damaged.
    """
    run, recorded_adapter, adapter = None, None, plan.adapter
    if checkpoint is not None and find_foreign_run(checkpoint):
        _check_kind(adapter, foreign_adapter_kind(checkpoint), checkpoint)
        run = _read_foreign_run(plan, source, checkpoint)
        recorded_adapter = run.adapter
    elif checkpoint is not None and (recorded_adapter := read_recorded_adapter(checkpoint)) is not None:
        _check_kind(adapter, recorded_adapter.kind, checkpoint)
    if recorded_adapter is not None:
        _check_flags(adapter, recorded_adapter, checkpoint)
    elif plan.reading.adapter_flags:
        raise ConfigError(
            f"{' and '.join(f'--{name}' for name in plan.reading.adapter_flags)}: says how to read an adapter that "
            "another program began, and this run resumes from none; leave it out, or name the checkpoint by "
            "--resume_from_checkpoint"
        )
    return ResumePoint(checkpoint=checkpoint, imported=run, recorded_adapter=recorded_adapter)


def _read_foreign_run(plan: RunPlan, source: Path, checkpoint: Path) -> ImportedRun:
    assert plan.training is not None
    optimizer = plan.training.optimizer
    if optimizer.optim == "adamw_8bit":
        raise ConfigError(
            f"{checkpoint} of another program holds AdamW's moments in float32, with which --optim adamw_8bit cannot "
            "continue; leave it out"
        )
    model_config = read_config(checkpoint if plan.adapter.trains_base else source)
    return read_foreign_run(checkpoint, model_config, adam_beta1=optimizer.beta1, reading=plan.reading)


def with_recorded_adapter(plan: RunPlan, resume_point: ResumePoint) -> RunPlan:
    """The plan; if another program began the adapter, with that adapter as the program recorded it."""
    if resume_point.recorded_adapter is None:
        return plan
    # the fields of an adapter have the names of the flags
    recorded: Adapter = replace(cast(Any, plan.adapter), **resume_point.recorded_adapter.flags)
    return replace(plan, adapter=recorded)


def restore_resume_point(trainer: Trainer, history: History, resume_point: ResumePoint) -> tuple[str, ...]:
    """Give a fresh trainer and log the state that they had when the checkpoint was written.

    The trainer must have the same model, adapter and data; and the same precision if bloomlm wrote the checkpoint.

    Returns:
        Lines that say what was, and what was not, taken from another program's checkpoint.

    Raises:
        CheckpointError, TrainingError: the checkpoint does not fit.
    """
    if resume_point.checkpoint is None:
        return ()
    if resume_point.imported is None:
        restore(trainer, resume_point.checkpoint)
        history.read_logged(resume_point.checkpoint)
        return ()
    _restore_imported(trainer, resume_point.imported, resume_point.checkpoint)
    history.global_step, history.epoch = trainer.step, trainer.epoch
    # without its evaluations, whose numbers depend on padding
    names = ("step", "epoch", "loss", "learning_rate")
    history.log_history = [{n: entry[n] for n in names if n in entry} for entry in resume_point.imported.losses]
    return tuple(_lines(trainer, resume_point.imported, resume_point.checkpoint))


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Give a trainer the state that it had when a checkpoint was written.

    The trainer must have the same model, adapter, precision, data and seed; bloomlm must have written the checkpoint.

    Raises:
        CheckpointError, TrainingError: the checkpoint does not fit.
    """
    if adapter_of(trainer.model) is None:
        _read_weights(trainer, checkpoint)
    tensors, _ = trainer.state()
    values = load_training_state(checkpoint, tensors)
    try:
        trainer.load_state(tensors, values)
    except BloomlmError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint} holds no state of this trainer: {error!r}; resume from another one"
        ) from error


def _read_weights(trainer: Trainer, checkpoint: Path) -> None:
    reader = open_reader(checkpoint, read_config(checkpoint))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            own_part(parameter).copy_(reader.read_box(name, own_bounds(name, parameter, trainer.mesh)))


def _restore_imported(trainer: Trainer, state: ImportedRun, checkpoint: Path) -> None:
    learned = trainer.learned.optimized
    _check_names("weights", state.weights, learned, checkpoint)
    if state.exp_avg:
        _check_names("moments of AdamW", state.exp_avg, learned, checkpoint)
    tensors, values = trainer.state()
    for name, parameter in learned.items():
        exact = state.master_weights if name in state.master_weights else state.weights
        _fill(global_tensor(name, parameter.detach(), trainer.mesh), exact[name], name, checkpoint)
        if state.exp_avg:
            _fill(tensors[f"optimizer/{name}/exp_avg"], state.exp_avg[name], name, checkpoint)
            _fill(tensors[f"optimizer/{name}/exp_avg_sq"], state.exp_avg_sq[name], name, checkpoint)
            tensors[f"optimizer/{name}/step"].fill_(state.updates)
    if values["loss_scale"] is not None and state.loss_scale is not None:
        values["loss_scale"]["value"] = state.loss_scale
    values |= {"step": state.step, "data": _position(trainer, state.step, values["data"])}
    trainer.load_state(tensors, values)


def _check_kind(adapter: Adapter, kind: str | None, checkpoint: Path) -> None:
    """Check that the checkpoint holds what learns in this run: a kind of adapter, or (None) the whole model."""
    given = adapter.training_flag
    if given == kind:
        return
    if kind is not None:
        name = "LoRA" if kind == "lora" else "prefix"
        raise ConfigError(f"{checkpoint} holds a {name} adapter; to continue training it, give --{kind}")
    raise ConfigError(
        f"{checkpoint} holds a whole model; to continue training it, leave out --{given}. To train an adapter for it, "
        "give it as --model_name_or_path instead of --resume_from_checkpoint"
    )


def _check_flags(adapter: Adapter, recorded_adapter: RecordedAdapter, checkpoint: Path | None) -> None:
    """Refuse a flag that is given and contradicts the adapter's own configuration."""
    default = type(adapter)()
    for name, recorded in recorded_adapter.flags.items():
        given = getattr(adapter, name)
        is_same = set(given) == set(recorded) if isinstance(recorded, tuple) else given == recorded
        if not is_same and given != getattr(default, name):
            raise ConfigError(
                f"--{name} is {given}, but the adapter in {checkpoint} began with {recorded}; leave the flag out to "
                "continue, or start a new run in another --output_dir"
            )


def _check_names(what: str, found: Mapping[str, Any], learned: Iterable[str], checkpoint: Path) -> None:
    expected = set(learned)
    problems = []
    if missing := sorted(expected - found.keys()):
        problems.append(f"lacks {name_some(missing)}")
    if extra := sorted(found.keys() - expected):
        problems.append(f"has {name_some(extra)}, which do not learn in this run")
    if problems:
        raise CheckpointError(f"{checkpoint}: among its {what} it {' and '.join(problems)}")


def _fill(target: Tensor, stored: LazyTensor, name: str, checkpoint: Path) -> None:
    """Copy a stored tensor, or this rank's part of it, into a parameter."""
    if stored.shape != tuple(target.shape):
        raise CheckpointError(
            f"{checkpoint}: {name} or its moments have shape {list(stored.shape)}; expected {list(target.shape)}"
        )
    fill(target, stored.read())


def _position(trainer: Trainer, step: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """The position in the data after this many steps, counted in examples of the current epoch."""
    accumulation = trainer.config.gradient_accumulation_steps
    epoch, steps = divmod(step, trainer.steps_per_epoch)
    position = steps * accumulation * data["num_examples"] // len(trainer.batches)
    return {**data, "epoch": epoch, "position": position}


def _lines(trainer: Trainer, state: ImportedRun, checkpoint: Path) -> Iterable[str]:
    taken = ["weights of the whole model" if state.adapter is None else state.adapter.describe()]
    if state.exp_avg:
        taken.append(f"AdamW's moments after {state.updates} updates")
    if state.master_weights:
        taken.append("fp32 copies of the weights")
    if state.loss_scale is not None and trainer.loss_scale is not None:
        taken.append(f"loss scale {state.loss_scale:g}")
    yield f"from {state.origin}'s {checkpoint}: step {state.step}, {', '.join(taken)}; the order of the examples is new"
    if not state.exp_avg:
        yield (
            f"warning: {checkpoint} has no optimizer state, so AdamW's moments begin at zero; only weights, step and "
            "learning rate continue, and the losses will differ from the recorded ones"
        )
    rate, recorded = trainer.schedule(state.step), state.learning_rate
    if recorded is None or math.isclose(rate, recorded, rel_tol=SAME_RATE):
        return
    if math.isclose(trainer.schedule(state.updates), recorded, rel_tol=SAME_RATE):
        yield (
            f"the learning rate of the next step is {rate:g} and not {recorded:g}, because the schedule of bloomlm "
            f"counts {state.step - state.updates} steps that fp16 skipped"
        )
        return
    steps = "" if state.max_steps is None else f" and --max_steps {state.max_steps}"
    yield (
        f"warning: with these flags the learning rate of the next step is {rate:g}, but the checkpoint recorded "
        f"{recorded:g}; to follow its schedule, give the flags of the recorded run{steps}"
    )
