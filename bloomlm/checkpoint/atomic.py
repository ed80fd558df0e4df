"""Files and directories that appear whole or not at all, whatever moment the process dies or the disk fills up.

Everything is written beside its place under a name that ends in .bloomlm-tmp, brought to the disk, and renamed. While
it is being written it is locked (flock), so that the next writer can tell what a killed one left behind, and remove it.
"""

import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bloomlm.errors import CheckpointError

TEMPORARY_SUFFIX = ".bloomlm-tmp"
REPLACED_SUFFIX = ".bloomlm-old"
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Fill a directory aside, then put it in its place, replacing what was there.

    Where the file system can exchange two names (Linux) there is no moment without a complete directory of this name;
    elsewhere the old one is first renamed to NAME.bloomlm-old, and put back by the next call should this one die there.

    Args:
        final: where it shall be; its parents are made.

    Yields:
        An empty directory beside it to write into. After an error it is gone, and final is as before.

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
    """An empty directory in the same place as path, locked against other writers' cleaning, removed in the end.

    Raises:
        OSError: it cannot be made.
    """
    _clean(path.parent)
    temporary = _beside(path)
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file aside, bring it to the disk, and rename it over what was there.

    Args:
        path: the file; its parents are made.
        content: bytes, or text for UTF-8.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent)
        with temporary.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Bring a directory and everything in it to the disk."""
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
    """Swap two names at once; False where the system or the file system has no such call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    arguments = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    return bool(rename(*arguments) == 0)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _put_back(final: Path) -> None:
    """Undo the first of two renames where a writer was killed before the second."""
    replaced = final.with_name(f".{final.name}{REPLACED_SUFFIX}")
    if replaced.is_dir():
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)


def _clean(directory: Path) -> None:
    """Remove what killed writers left half written in a directory."""
    for left_over in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):  # locked: its writer lives; gone: another cleaner was faster
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
