"""What all writers use: a directory that appears whole or not at all, progress in bytes, and a thread that writes."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from bloomlm.errors import CheckpointError, format_bytes
from bloomlm.files.atomic import atomic_directory

Report = Callable[[int], None]
"""Called with the number of bytes processed since the last call."""

CONFIG_FILES = ("config.json", "adapter_config.json", "lora_config.json", "prefix_config.json")


class WritesItself(Protocol):
    """Something that is written beside a model, such as its tokenizer."""

    def save(self, directory: Path) -> None:
        """Write its files into an existing directory."""
        ...


def no_report(num_bytes: int) -> None:
    """Ignore progress."""


@contextmanager
def output_directory(final: Path, size_bytes: int, tokenizer: WritesItself | None) -> Iterator[Path]:
    """Fill a directory with a model or an adapter; it appears whole or not at all, as atomic_directory says.

    Args:
        final: its final path; an older model or adapter there is replaced.
        size_bytes: size of the tensors to be written.
        tokenizer: written beside the tensors.

    Yields:
        An empty directory to write into.

    Raises:
        CheckpointError: the directory holds other files, the disk is too full, or it cannot be written.
    """
    check_replaceable(final)
    _check_space(final, size_bytes)
    with atomic_directory(final) as temporary:
        yield temporary
        if tokenizer is not None:
            tokenizer.save(temporary)


def check_replaceable(directory: Path) -> None:
    """Refuse to replace a directory that holds anything but the files of one model or adapter.

    Raises:
        CheckpointError: the directory holds other files.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not any((directory / name).is_file() for name in CONFIG_FILES):
        raise CheckpointError(
            f"{directory} holds files but no model or adapter to replace; name an empty or a new directory"
        )
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
            f"{directory}: {format_bytes(size_bytes)} are to be written, and {format_bytes(free_bytes)} are free "
            "there; make room, or name a directory on another disk"
        )


class WriteBehind:
    """One thread that runs actions in order; at most one is pending, so little memory is held.

    As a context manager it waits for all actions when it exits. The next call or the exit raises an action's error.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._last: Future[object] | None = None

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()

    def do(self, action: Callable[[], object]) -> None:
        """Start an action when the last one is done."""
        self.wait()
        self._last = self._pool.submit(action)

    def wait(self) -> None:
        """Wait until all actions are done and their data is released."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


class FileBehind:
    """A binary file whose seeks and writes run in the thread."""

    def __init__(self, file: BinaryIO, behind: WriteBehind) -> None:
        self._file, self._behind = file, behind

    def seek(self, offset: int) -> None:
        """Move to an offset."""
        self._behind.do(lambda: self._file.seek(offset))

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes, which must not change afterwards; returns their number."""
        self._behind.do(lambda: self._file.write(data))
        return len(data)
