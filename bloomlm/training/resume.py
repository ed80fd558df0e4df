"""Going on from a checkpoint: one of our own, or one that PaddleNLP wrote.

Of PaddleNLP's it takes weights, AdamW's moments, step and loss scale, and tells the user so. The order of the examples
is this program's own, begun after as many steps.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.paddle.adapter_files import LORA_CONFIG_FILE, PREFIX_CONFIG_FILE
from bloomlm.checkpoint.paddle.array import LazyTensor
from bloomlm.checkpoint.paddle.optimizer import (
    PaddleTrainingState,
    find_paddle_checkpoint,
    read_paddle_training_state,
)
from bloomlm.checkpoint.paddle.prefix import PrefixLayout
from bloomlm.checkpoint.paddle.structure import AdapterStructure, LoraStructure, read_structure
from bloomlm.checkpoint.reader import read_config
from bloomlm.errors import CheckpointError, ConfigError, name_some
from bloomlm.parallel.gather import global_tensor
from bloomlm.training.checkpoints import restore
from bloomlm.training.config import TrainingConfig, default_of
from bloomlm.training.history import History
from bloomlm.training.step import Trainer, steps_per_epoch

SAME_RATE = 1e-5
"""Relative difference of learning rates that rounding explains."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a run goes on from; empty for a fresh one."""

    checkpoint: Path | None = None
    """The checkpoint-N."""
    paddle_state: PaddleTrainingState | None = None
    """What it holds, if PaddleNLP wrote it."""
    structure: AdapterStructure | None = None
    """Of an adapter that PaddleNLP began, which our own checkpoints note."""


def read_begun(config: TrainingConfig, source: Path, checkpoint: Path | None) -> Begun:
    """Look at what a run goes on from, and hold the flags against it.

    Args:
        config: resolved.
        source: directory of the model that the flags name.
        checkpoint: to go on from; None: a fresh run.

    Raises:
        ConfigError: flags that contradict the checkpoint, or say how to read files that are not there.
        CheckpointError: files of the checkpoint are missing or damaged.
    """
    state, structure = None, None
    if checkpoint is not None and find_paddle_checkpoint(checkpoint):
        flags = {LORA_CONFIG_FILE: "--lora", PREFIX_CONFIG_FILE: "--prefix_tuning"}
        found = [flag for name, flag in flags.items() if (checkpoint / name).is_file()]
        _check_kind(config, next(iter(found), None), checkpoint)
        if config.optim == "adamw_8bit":
            raise ConfigError(
                f"{checkpoint} is PaddleNLP's and holds AdamW's moments in float32, which --optim adamw_8bit cannot go "
                "on with; leave it out"
            )
        is_adapter = config.lora or config.prefix_tuning
        state = read_paddle_training_state(
            checkpoint,
            read_config(source if is_adapter else checkpoint),
            adam_beta1=config.adam_beta1,
            prefix_layout=None if config.prefix_layout is None else PrefixLayout(config.prefix_layout),
            trained_tensor_parallel_degree=config.trained_tensor_parallel_degree,
        )
        structure = state.structure
    elif checkpoint is not None and (structure := read_structure(checkpoint)) is not None:
        _check_kind(config, "--lora" if isinstance(structure, LoraStructure) else "--prefix_tuning", checkpoint)
    if structure is not None:
        _check_flags(config, structure, checkpoint)
    elif config.prefix_layout is not None or config.trained_tensor_parallel_degree is not None:
        raise ConfigError(
            "--prefix_layout and --trained_tensor_parallel_degree say how to read an adapter that PaddleNLP began, and "
            "this run goes on from none; leave them out, or name its checkpoint-N as --resume_from_checkpoint"
        )
    return Begun(checkpoint=checkpoint, paddle_state=state, structure=structure)


def with_recorded_flags(config: TrainingConfig, begun: Begun) -> TrainingConfig:
    """The flags with those of an adapter that PaddleNLP began as it recorded them."""
    return config if begun.structure is None else replace(config, **_recorded_flags(begun.structure))


def restore_begun(trainer: Trainer, history: History, begun: Begun) -> tuple[str, ...]:
    """Bring a fresh trainer and log to where the checkpoint was written.

    Args:
        trainer: of the same model, adapter and data; of the same precision too, unless PaddleNLP wrote the checkpoint.
        history: of the run.
        begun: what it goes on from.

    Returns:
        A line about each thing that was, or was not, taken over from PaddleNLP.

    Raises:
        CheckpointError, TrainingError: the checkpoint does not fit.
    """
    if begun.checkpoint is None:
        return ()
    if begun.paddle_state is None:
        restore(trainer, begun.checkpoint)
        history.read_logged(begun.checkpoint)
        return ()
    _restore_from_paddle(trainer, begun.paddle_state, begun.checkpoint)
    history.global_step, history.epoch = trainer.step, trainer.epoch
    # its evaluations are left out, for they attended to pads
    names = ("step", "epoch", "loss", "learning_rate")
    history.log_history = [{n: entry[n] for n in names if n in entry} for entry in begun.paddle_state.losses]
    return tuple(_lines(trainer, begun.paddle_state, begun.checkpoint))


def _restore_from_paddle(trainer: Trainer, state: PaddleTrainingState, checkpoint: Path) -> None:
    learned = trainer.learned.optimized
    _check_names("weights", state.weights, learned, checkpoint)
    if state.exp_avg:
        _check_names("moments of AdamW's", state.exp_avg, learned, checkpoint)
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


def _check_kind(config: TrainingConfig, adapter_flag: str | None, checkpoint: Path) -> None:
    """Whether the flags let the same thing learn that learned there."""
    given = "--lora" if config.lora else "--prefix_tuning" if config.prefix_tuning else None
    if given == adapter_flag:
        return
    if adapter_flag is not None:
        kind = "LoRA" if adapter_flag == "--lora" else "prefix"
        raise ConfigError(f"{checkpoint} holds a {kind} adapter; to go on training it give {adapter_flag}")
    raise ConfigError(
        f"{checkpoint} holds a whole model; to go on training it leave out {given}. To train an adapter of it, give it "
        "as --model_name_or_path instead of --resume_from_checkpoint"
    )


def _check_flags(config: TrainingConfig, structure: AdapterStructure, checkpoint: Path | None) -> None:
    """The adapter's own configuration decides; a flag that was given and says something else is refused."""
    for name, recorded in _recorded_flags(structure).items():
        given = getattr(config, name)
        is_same = set(given) == set(recorded) if isinstance(recorded, tuple) else given == recorded
        if not is_same and given != default_of(name):
            raise ConfigError(
                f"--{name} is {given}, and the adapter in {checkpoint} was begun with {recorded}; leave the flag out "
                "to go on, or start anew in another --output_dir"
            )


def _recorded_flags(structure: AdapterStructure) -> dict[str, Any]:
    if not isinstance(structure, LoraStructure):
        prefix = structure.config
        return {"num_prefix_tokens": prefix.num_prefix_tokens, "prefix_projection": prefix.prefix_projection}
    lora = structure.config
    return {
        "r": lora.r // structure.num_slots,
        "lora_alpha": lora.alpha / structure.num_slots,
        "lora_dropout": lora.lora_dropout,
        "target_modules": lora.target_modules,
    }


def _check_names(what: str, found: Mapping[str, Any], learned: Iterable[str], checkpoint: Path) -> None:
    expected = set(learned)
    problems = []
    if missing := sorted(expected - found.keys()):
        problems.append(f"lacks those of {name_some(missing)}")
    if extra := sorted(found.keys() - expected):
        problems.append(f"has those of {name_some(extra)}, which do not learn in this run")
    if problems:
        raise CheckpointError(f"{checkpoint}: of the {what} it {' and '.join(problems)}")


def _fill(target: Tensor, stored: LazyTensor, name: str, checkpoint: Path) -> None:
    """Read a tensor; of one that is divided among ranks, this rank's part is kept."""
    if stored.shape != tuple(target.shape):
        raise CheckpointError(
            f"{checkpoint}: {name} or its moments have shape {list(stored.shape)}; expected {list(target.shape)}"
        )
    value = stored.read()
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
        target = target.to_local()
    with torch.no_grad():
        target.copy_(value)


def _position(trainer: Trainer, step: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """Where so many steps lead in this program's order of the examples.

    The position counts examples: that share of them which was in the epoch's batches so far.
    """
    accumulation = trainer.config.gradient_accumulation_steps
    epoch, steps = divmod(step, steps_per_epoch(len(trainer.batches), accumulation))
    position = steps * accumulation * data["num_examples"] // len(trainer.batches)
    return {**data, "epoch": epoch, "position": position}


def _lines(trainer: Trainer, state: PaddleTrainingState, checkpoint: Path) -> Iterable[str]:
    taken = [_describe(state.structure)]
    if state.exp_avg:
        taken.append(f"AdamW's moments after {state.updates} updates")
    if state.master_weights:
        taken.append("fp32 copies of the weights")
    if state.loss_scale is not None and trainer.loss_scale is not None:
        taken.append(f"loss scale {state.loss_scale:g}")
    yield f"from PaddleNLP's {checkpoint}: step {state.step}, {', '.join(taken)}; the order of the examples is new"
    if not state.exp_avg:
        yield (
            f"warning: {checkpoint} has no optimizer.pdopt, so AdamW's moments begin at zero; only weights, step and "
            "learning rate go on, and the losses will not be those of the recorded run"
        )
    rate, recorded = trainer.schedule(state.step), state.learning_rate
    if recorded is None or math.isclose(rate, recorded, rel_tol=SAME_RATE):
        return
    if math.isclose(trainer.schedule(state.updates), recorded, rel_tol=SAME_RATE):
        yield (
            f"the learning rate of the next step is {rate:g} and not {recorded:g}: {state.step - state.updates} steps "
            "that fp16 skipped count for the schedule here, and did not there"
        )
        return
    steps = "" if state.max_steps is None else f" and --max_steps {state.max_steps}"
    yield (
        f"warning: these flags give the next step the learning rate {rate:g}, the checkpoint recorded {recorded:g}; "
        f"to follow its schedule give the flags of the recorded run{steps}"
    )


def _describe(structure: AdapterStructure | None) -> str:
    if structure is None:
        return "weights of the whole model"
    if isinstance(structure, LoraStructure):
        flags = _recorded_flags(structure)
        kind = "" if structure.num_slots == 1 else f", as a plain one of r {structure.config.r} in PEFT's files"
        return f"LoRA (r {flags['r']}, lora_alpha {flags['lora_alpha']:g}{kind})"
    prefix: PrefixConfig = structure.config
    projection = ", with projection" if prefix.prefix_projection else ""
    arrangement = structure.arrangement
    return (
        f"prefix of {prefix.num_prefix_tokens} tokens ({arrangement.layout.value} layout, trained by "
        f"{arrangement.tp_degree} rank{'s' if arrangement.tp_degree > 1 else ''}{projection})"
    )
