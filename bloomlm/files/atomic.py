"""Files and directories that appear complete or not at all, even if the process is killed or the disk fills up.

Everything is first written under a temporary name that ends in .bloomlm-tmp, flushed to the disk, and then renamed.
The writer holds a lock (flock) on it meanwhile; the next writer removes temporary files without a lock, which a killed
process has left behind.
"""

import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bloomlm.errors import CheckpointError

TEMPORARY_SUFFIX = ".bloomlm-tmp"
REPLACED_SUFFIX = ".bloomlm-old"
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Fill a temporary directory, then put it in its final place, replacing what was there.

    Where the file system can exchange two names (Linux), there is a complete directory of this name at every moment.
    Elsewhere the old one is first renamed to NAME.bloomlm-old; if the process dies then, the next call puts it back.

    Args:
        final: the final place; missing parents are created.

    Yields:
        An empty directory beside it to write into. After an error it is removed, and `final` is unchanged.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission).
    """
    final = final.resolve()
    try:
        if final.exists() and not final.is_dir():
            raise CheckpointError(f"{final} is a file; expected a directory, or nothing yet")
        final.parent.mkdir(parents=True, exist_ok=True)
        _put_back(final)
        with directory_beside(final) as temporary:
            yield temporary
            sync_tree(temporary)
            _put_in_place(temporary, final)  # afterwards temporary is what final was before
    except OSError as error:
        raise _cannot_write(final, error) from error


@contextmanager
def directory_beside(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, locked so that other writers do not clean it up, and removed at the end.

    Raises:
        OSError: it cannot be created.
    """
    _clean(path.parent)
    temporary, lock = _make_locked(path, Path.mkdir)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a temporary file; at the end flush it to the disk, and rename it, replacing what was there.

    Args:
        path: the file; missing parents are created.

    Yields:
        The temporary file. After an error it is removed, and an older file is unchanged.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent)
        temporary, lock = _make_locked(path, _create_file)
        try:
            with temporary.open("wb") as file:
                yield file
            os.fsync(lock)
            temporary.replace(path)
        finally:
            with suppress(OSError):  # normally it has its final name by now
                temporary.unlink()
            os.close(lock)
        sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a whole file, as atomic_file does.

    Args:
        path: the file; missing parents are created.
        content: bytes, or text, which is encoded in UTF-8.

    Raises:
        CheckpointError: it cannot be written; an older file is unchanged.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush a directory and everything in it to the disk."""
    for root, _, files in os.walk(directory, topdown=False):
        for file in files:
            sync(Path(root, file))
        sync(Path(root))


def _put_in_place(temporary: Path, final: Path) -> None:
    if not final.exists():
        temporary.rename(final)
    elif not _exchange(temporary, final):
        replaced = final.with_name(f".{final.name}{REPLACED_SUFFIX}")
        final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    sync(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    arguments = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    return bool(rename(*arguments) == 0)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _make_locked(path: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a file or directory beside a path; returns it and the descriptor that holds its lock."""
    while True:
        temporary = _beside(path)
        create(temporary)
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, lock
            os.close(lock)
        # Before it was locked, another process has removed it as left behind by a killed writer.


def _create_file(path: Path) -> None:
    path.touch(exist_ok=False)


def _put_back(final: Path) -> None:
    """Undo the first of two renames if a writer was killed between them."""
    replaced = final.with_name(f".{final.name}{REPLACED_SUFFIX}")
    if replaced.is_dir():
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)


def _clean(directory: Path) -> None:
    """Remove temporary files and directories that killed writers left behind."""
    for left_over in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):  # it is locked, so its writer is alive, or another process has removed it first
            descriptor = os.open(left_over, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left_over.is_dir():
                    shutil.rmtree(left_over, ignore_errors=True)
                else:
                    left_over.unlink()
            finally:
                os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written ({error}); what was there before is untouched")
