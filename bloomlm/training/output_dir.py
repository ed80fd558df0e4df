"""The directory of a run: checks, the choice of a checkpoint to resume from, and what is written there.

output_dir/
    run.yaml               the resolved flags, which --config reads
    metrics.jsonl, runs/   the log, written from the first step on
    checkpoint-N/          weights or adapter, tokenizer, log, and the state of training
    ...                    at the end: the model or adapter, results, picture
"""

import logging
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from bloomlm.adapters.base import adapter_of
from bloomlm.checkpoint.adapters.peft import gather_adapter, save_adapter
from bloomlm.checkpoint.formats import RecordedAdapter, find_foreign_run
from bloomlm.checkpoint.main_rank import failing_together, one_directory
from bloomlm.checkpoint.training_state import (
    checkpoint_directory,
    checkpoint_path,
    checkpoint_step,
    complete_checkpoints,
    find_damage,
    newest_checkpoint,
    prune_checkpoints,
    save_training_state,
)
from bloomlm.checkpoint.writer import write_model
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.files.atomic import atomic_directory, atomic_write, sync
from bloomlm.files.flag_file import read_flag_file
from bloomlm.training.config import TrainingConfig
from bloomlm.training.results import History
from bloomlm.training.run_plan import OutputPlan
from bloomlm.training.step import Trainer

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
MERGED_DIRECTORY = "merged"

# Files that may exist before the first checkpoint; a run that was killed by then starts from the beginning.
_EARLY_NAMES = re.compile(r"run\.yaml|metrics\.jsonl|runs|learning_rate\.png|\..*|.*\.log")
# Everything that a run writes and that --overwrite_output_dir removes.
_OWN_NAMES = re.compile(
    r"run\.yaml|metrics\.jsonl|runs|merged|(loss|learning_rate)\.png|infer_result\.json|trainer_state\.json"
    r"|(train|eval|all)_results\.json|checkpoint-\d+|prefix_projection\.safetensors"
    r"|adapter_(config\.json|model\.safetensors)|(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer(_config)?\.json|special_tokens_map\.json"
)
_WEIGHT_NAMES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors"
    r"|prefix_projection\.safetensors"
)
# Flags that may differ when a run resumes, because they do not change what it learns.
_FREE_FLAGS = {
    *("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm", "report_to", "logging_steps"),
    *("save_steps", "save_strategy", "save_total_limit", "eval_steps", "evaluation_strategy", "merge_weights"),
    *("generate_num", "max_shard_size", "per_device_eval_batch_size", "do_eval", "eval_file"),
    *("early_stopping_patience", "early_stopping_threshold"),
}


def prepare(output: OutputPlan, *, trains: bool) -> Path | None:
    """Create the directory if necessary, and find the checkpoint to resume from.

    Args:
        output: the directory, and the flags that say how to use it.
        trains: whether the run trains, and so may resume.

    Returns:
        The checkpoint to resume from; None: start from the beginning.

    Raises:
        ConfigError: the directory holds other files, or the chosen checkpoint does not exist.
        CheckpointError: that checkpoint is damaged, or the directory cannot be created.
    """
    directory = output.directory
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--output_dir {directory} is a file; expected a directory or a new name")
    if output.overwrites:
        _remove_own(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--output_dir {directory} cannot be created: {error}") from error
    if output.overwrites or not trains:
        return None
    if output.resume_from is not None:
        return _chosen_checkpoint(output.resume_from, directory)
    ours = newest_checkpoint(directory)
    found = [*_foreign_checkpoints(directory), *([] if ours is None else [ours])]
    if not found:
        _refuse_foreign(directory)
        return None
    return max(found, key=checkpoint_step)


def write_run_file(config: TrainingConfig) -> None:
    """Write the resolved flags to run.yaml, under the headings of --help."""
    lines = ["# The flags of this run. To repeat it: bloomlm finetune --config run.yaml --output_dir OTHER"]
    section = None
    for item in fields(config):
        if item.metadata["section"] != section:
            section = item.metadata["section"]
            lines += ["", f"# {section}"]
        lines.append(yaml.safe_dump({item.name: _plain(getattr(config, item.name))}, allow_unicode=True).rstrip())
    atomic_write(Path(config.output_dir) / RUN_FILE, "\n".join(lines) + "\n")


def changed_flags(config: TrainingConfig) -> str | None:
    """The flags that a resumed run has changed since its beginning, in words; None if no change matters."""
    path = Path(config.output_dir) / RUN_FILE
    try:
        before = read_flag_file(path)
    except (OSError, ValueError):
        return None
    now = {name: _plain(value) for name, value in asdict(config).items() if name not in _FREE_FLAGS}
    changes = [
        f"--{name} was {before[name]}, is {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    return "; ".join(changes) or None


@dataclass(frozen=True, kw_only=True)
class CheckpointWriter:
    """Writes checkpoints and the final model; every rank must make each call."""

    trainer: Trainer
    tokenizer: Tokenizer
    history: History
    """The log, which also knows the best checkpoint."""
    output: OutputPlan
    """Where checkpoints are written, and how many are kept."""
    base_model: str
    """Name of the base model in the files of an adapter."""
    recorded_adapter: RecordedAdapter | None
    """An adapter that another program began, which checkpoints record; None: the flags describe it."""

    def save(self, step: int) -> None:
        """Write checkpoint-STEP, then prune.

        Raises:
            CheckpointError: the checkpoint cannot be written; older ones are unchanged.
        """
        mesh, output = self.trainer.mesh, self.output
        with one_directory(checkpoint_directory(output.directory, step), mesh) as directory:
            with failing_together(mesh):  # before they exchange the state of training
                self.write_learned(directory)
                if self.recorded_adapter is not None:
                    self.recorded_adapter.write(directory)
            save_training_state(directory, *self.trainer.state(), mesh=mesh)
            if mesh.is_main:
                self.history.write(directory)
        self.prune()

    def prune(self) -> None:
        """Remove the oldest checkpoints beyond the limit, but not the best one if the run will end with it."""
        output = self.output
        if output.save_total_limit is not None and self.trainer.mesh.is_main:
            best = self.history.best_model_checkpoint if output.ends_with_best else None
            kept = None if best is None else output.directory / best
            prune_checkpoints(output.directory, output.save_total_limit, kept)

    def write_learned(self, directory: Path) -> None:
        """Write the model, or its adapter, and the tokenizer into a directory."""
        model, mesh = self.trainer.model, self.trainer.mesh
        if adapter_of(model) is None:
            write_model(
                directory,
                model.config,
                model.named_parameters(),
                max_shard_size_bytes=self.output.max_shard_size_bytes,
                mesh=mesh,
            )
        else:
            whole = model if mesh.is_alone else gather_adapter(model, mesh)
            if mesh.is_main:
                save_adapter(whole, directory, self.base_model)
        if mesh.is_main:
            self.tokenizer.save(directory)

    def write_final(self) -> None:
        """Put the files of write_learned into the directory of the run, beside its other files.

        They are first written to another directory, so an older model stays complete if the disk is full.

        Raises:
            CheckpointError: the files cannot be written.
        """
        output_dir = self.output.directory
        aside = output_dir / ".final"
        with one_directory(atomic_directory(aside), self.trainer.mesh) as directory:
            self.write_learned(directory)
        if not self.trainer.mesh.is_main:
            return
        try:
            new = {path.name for path in aside.iterdir()}
            # configurations come last, so that the weights exist wherever a configuration does
            for path in sorted(aside.iterdir(), key=lambda path: path.suffix == ".json"):
                path.replace(output_dir / path.name)
            for path in output_dir.iterdir():
                if _WEIGHT_NAMES.fullmatch(path.name) and path.name not in new:
                    path.unlink()  # of an earlier run with another kind of model or number of files
            aside.rmdir()
            sync(output_dir)
        except OSError as error:
            raise CheckpointError(f"the final model cannot be moved into {output_dir}: {error}") from error


def _chosen_checkpoint(chosen: Path, output_dir: Path) -> Path:
    if not chosen.is_dir():
        raise ConfigError(f"--resume_from_checkpoint {chosen}: no such directory; expected a checkpoint-N of a run")
    step = checkpoint_step(chosen)
    damage = None if find_foreign_run(chosen) else find_damage(chosen)
    if damage is not None:
        raise CheckpointError(f"--resume_from_checkpoint {chosen} is damaged: {damage}")
    if theirs := [path.name for path in _foreign_checkpoints(output_dir) if checkpoint_step(path) > step]:
        raise ConfigError(
            f"--output_dir {output_dir} holds {', '.join(theirs)} of another program, which this run would replace "
            f"after resuming from {chosen}; name another --output_dir"
        )
    later = [path for path in complete_checkpoints(output_dir) if checkpoint_step(path) > step]
    if not later:
        return chosen
    if checkpoint_path(output_dir, step).resolve() != chosen.resolve():
        # the run began from a checkpoint elsewhere and has already written later ones here
        logger.warning("resuming from %s, which this run wrote after --resume_from_checkpoint %s", later[-1], chosen)
        return later[-1]
    for path in later:
        logger.warning("removing %s, because the run goes back to %s", path, chosen)
        shutil.rmtree(path)
    return chosen


def _foreign_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N directories of other programs, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if find_foreign_run(path)), key=checkpoint_step)


def _refuse_foreign(output_dir: Path) -> None:
    if not output_dir.is_dir():
        return
    found = sorted(path.name for path in output_dir.iterdir() if not _EARLY_NAMES.fullmatch(path.name))
    if found:
        listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise ConfigError(
            f"--output_dir {output_dir} holds {listed}, but no checkpoint to resume from. Name another directory, or "
            "give --overwrite_output_dir to remove what an earlier run left there"
        )


def _remove_own(output_dir: Path) -> None:
    if not output_dir.is_dir():
        return
    for path in output_dir.iterdir():
        if not _OWN_NAMES.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
