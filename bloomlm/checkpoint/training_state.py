"""checkpoint-N directories: everything a run needs to resume, complete or absent.

    output_dir/checkpoint-500/
        ...                          weights or adapter and tokenizer, written by the caller
        training_state/              the run's tensors (optimizer, masters, ...), torch's distributed checkpoint format
        training_state.json          its plain values: step, data position, loss scale, ...
        checkpoint_manifest.json     every file and its size; a directory that differs from it is damaged

The directory is filled under another name, flushed to the disk and renamed, so that older checkpoints survive a killed
process, a full disk and a power failure. The distributed format is read on any number of processes.
Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import json
import logging
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bloomlm.checkpoint.distributed_index import INDEX_FILE, check_index
from bloomlm.checkpoint.formats import find_foreign_run
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.files.atomic import TEMPORARY_SUFFIX, atomic_directory
from bloomlm.files.json_text import read_json, read_object
from bloomlm.parallel.mesh import ALONE, Mesh

logger = logging.getLogger(__name__)

MANIFEST_FILE = "checkpoint_manifest.json"
TENSORS_DIRECTORY = "training_state"
VALUES_FILE = "training_state.json"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint-N directory.

    Raises:
        ConfigError: the directory has another name.
    """
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not a checkpoint; expected a directory named checkpoint-STEP")
    return int(match[1])


@contextmanager
def checkpoint_directory(output_dir: Path, step: int) -> Iterator[Path]:
    """Fill a temporary directory, which becomes checkpoint-STEP, complete and flushed to the disk, when the block ends.

    Args:
        output_dir: the run's directory; created if it is missing.
        step: number of steps done.

    Yields:
        An empty directory to write into.

    Raises:
        CheckpointError: the checkpoint cannot be written; older checkpoints are untouched.
    """
    final = checkpoint_path(output_dir, step)
    try:
        with atomic_directory(final) as directory:
            yield directory
            sizes = {name: size for name, size in _file_sizes(directory).items() if name != MANIFEST_FILE}
            manifest = {"step": step, "files": sizes}
            (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{final} cannot be written: {error}; older checkpoints are untouched") from error


def save_training_state(
    directory: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], mesh: Mesh = ALONE
) -> None:
    """Write a run's state into a directory of checkpoint_directory.

    Args:
        directory: the directory to write into.
        tensors: name -> tensor.
        values: plain values that JSON can hold.
        mesh: the ranks, each of which writes its own parts.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with _single_process():
            save(dict(tensors), checkpoint_id=directory / TENSORS_DIRECTORY)
        if mesh.is_main:
            (directory / VALUES_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"the training state cannot be written to {directory}: {_cause(error)}") from error


def read_values(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        return read_object(checkpoint / VALUES_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / VALUES_FILE} cannot be read: {error}") from error


def load_training_state(checkpoint: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a run's state. No code in its files is executed.

    Args:
        checkpoint: a complete checkpoint-N directory.
        tensors: name -> tensor of the saved shape, whose content is replaced in place.

    Returns:
        The plain values.

    Raises:
        CheckpointError: files cannot be read, or hold other tensors.
    """
    if not (checkpoint / TENSORS_DIRECTORY / INDEX_FILE).is_file():
        raise CheckpointError(f"{checkpoint} holds no training state; expected a directory {TENSORS_DIRECTORY} in it")
    check_index(checkpoint / TENSORS_DIRECTORY)
    try:
        with _single_process():
            load(dict(tensors), checkpoint_id=checkpoint / TENSORS_DIRECTORY)
    except (Exception, CheckpointException) as error:  # damaged files raise errors of every kind
        raise CheckpointError(
            f"the training state in {checkpoint} does not fit this run: {_cause(error)}. Use the model, adapter, "
            "optimizer and precision of the saved run, or start in a new output_dir"
        ) from error
    return read_values(checkpoint)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The undamaged checkpoint-N directories that bloomlm wrote, oldest first; damaged ones are named in a warning."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    complete = []
    for checkpoint in sorted(found, key=checkpoint_step):
        if find_foreign_run(checkpoint):
            continue
        damage = find_damage(checkpoint)
        if damage is None:
            complete.append(checkpoint)
        else:
            logger.warning("%s is skipped: %s", checkpoint, damage)
    return complete


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The undamaged checkpoint of the highest step; None if there is none."""
    return next(reversed(complete_checkpoints(output_dir)), None)


def find_damage(checkpoint: Path) -> str | None:
    """A description of how a checkpoint differs from its manifest; None if it does not."""
    try:
        files = dict(read_json(checkpoint / MANIFEST_FILE)["files"])
        sizes = _file_sizes(checkpoint)
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, so it was never completed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST_FILE} cannot be read: {error}"
    for name, size in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes, expected {size}"
    return None


def prune_checkpoints(output_dir: Path, save_total_limit: int, best: Path | None = None) -> None:
    """Remove the oldest checkpoints beyond a limit, but neither the newest nor the best.

    Args:
        output_dir: the run's directory.
        save_total_limit: checkpoints to keep, at least 1; with a limit of 1, the newest and the best are both kept.
        best: the best checkpoint, which is kept; None: there is none.

    Raises:
        ConfigError: the limit is below 1.
    """
    if save_total_limit < 1:
        raise ConfigError(f"save_total_limit is {save_total_limit}; expected at least 1")
    complete = complete_checkpoints(output_dir)
    kept = {path.name for path in complete[-1:]} | ({best.name} if best is not None else set())
    for checkpoint in reversed(complete):
        if len(kept) < save_total_limit:
            kept.add(checkpoint.name)
    for checkpoint in complete:
        if checkpoint.name not in kept:
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """Rename before deleting, so that a killed process leaves no half-deleted directory with a checkpoint's name."""
    condemned = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        checkpoint.rename(condemned)
        shutil.rmtree(condemned)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", checkpoint, error)


def _file_sizes(directory: Path) -> dict[str, int]:
    return {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for root, _, names in os.walk(directory)
        for path in (Path(root, name) for name in names)
    }


@contextmanager
def _single_process() -> Iterator[None]:
    """Silence the warning that torch assumes a single process, where there is one."""
    with warnings.catch_warnings():
        if not (dist.is_available() and dist.is_initialized()):
            warnings.filterwarnings("ignore", message=".*single process.*")
        yield


def _cause(error: BaseException) -> str:
    """The first line of the original error inside the exception of the distributed checkpoint."""
    if isinstance(error, CheckpointException):
        first, _ = next(iter(error.failures.values()))
        return f"{type(first).__name__}: {first}".splitlines()[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
