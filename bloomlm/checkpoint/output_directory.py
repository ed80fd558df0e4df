"""The directory that converting and merging write: replaced as a whole or not at all, with progress in bytes."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from bloomlm.errors import CheckpointError
from bloomlm.files.atomic import atomic_directory

Report = Callable[[int], None]
"""Called with the number of bytes processed since the last call."""

CONFIG_FILES = ("config.json", "adapter_config.json", "lora_config.json", "prefix_config.json")


class WritesItself(Protocol):
    """A tokenizer, which is written into the same directory."""

    def save(self, directory: Path) -> None:
        """Write its files into an existing directory."""
        ...


def no_report(num_bytes: int) -> None:
    """Ignore progress."""


@contextmanager
def output_directory(final: Path, size_bytes: int, tokenizer: WritesItself | None) -> Iterator[Path]:
    """Fill a directory with a model or an adapter; it appears whole or not at all, as atomic_directory says.

    Args:
        final: its final place; an older model or adapter there is replaced.
        size_bytes: of its tensors.
        tokenizer: written beside them.

    Yields:
        An empty directory to write into.

    Raises:
        CheckpointError: the directory holds other things, the disk is too full, or it cannot be written.
    """
    check_replaceable(final)
    _check_space(final, size_bytes)
    with atomic_directory(final) as temporary:
        yield temporary
        if tokenizer is not None:
            tokenizer.save(temporary)


def check_replaceable(directory: Path) -> None:
    """Refuse to replace a directory that holds other things than the files of one model or adapter.

    Raises:
        CheckpointError: the directory holds other things.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not any((directory / name).is_file() for name in CONFIG_FILES):
        raise CheckpointError(f"{directory} holds files, and no model that could be replaced; name another directory")
    if nested := sorted(path.name for path in directory.iterdir() if path.is_dir()):
        raise CheckpointError(
            f"{directory} holds a model that would be replaced as a whole, and {nested[0]} with it; name another "
            "directory"
        )


def _check_space(directory: Path, size_bytes: int) -> None:
    """An older model is removed only after the new one is complete, so its space does not count as free."""
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < size_bytes:
        raise CheckpointError(
            f"{directory}: {size_bytes / 1e9:.1f} GB are to be written, and {free_bytes / 1e9:.1f} GB are free there; "
            "make room, or name a directory on another disk"
        )
