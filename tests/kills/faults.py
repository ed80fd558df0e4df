"""Faults at file-system events: at the k-th one below a directory, the process is killed, or the call fails.

Python announces every call that opens or changes a file by an audit event, whichever library makes the call, and before it
is made. So a fault at event k meets a directory in which exactly k - 1 changes were made.
Source: https://docs.python.org/3/library/audit_events.html
"""

import errno
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# event -> position of the directory's descriptor among its arguments, of the path that the call changes
_CHANGES = {
    "os.mkdir": (2, 0),
    "os.rename": (3, 1),  # also of os.replace
    "os.remove": (1, 0),
    "os.rmdir": (1, 0),
    "os.link": (3, 1),
    "os.symlink": (2, 1),
    "os.truncate": (None, 0),
    "shutil.rmtree": (None, 0),  # comes before its os.remove, and so right after the exchange of two names
}
# What a full disk still allows.
_FREES_SPACE = ("os.remove", "os.rmdir", "os.rename", "shutil.rmtree", "os.truncate")


@dataclass(frozen=True)
class Fault:
    """What happens to one process."""

    event: int
    """Number of the event, from 1."""
    error: int | None = None
    """Number of the error with which this call and all later ones fail; None: the process is killed."""
    rank: int = 0
    """Rank of the process."""

    def __str__(self) -> str:
        name = "SIGKILL" if self.error is None else errno.errorcode[self.error]
        return f"{name} at event {self.event} of rank {self.rank}"


def watch(root: Path, fault: Fault | None, count_file: Path) -> None:
    """From now on, count the events of this process below a directory, and bring the fault about.

    Args:
        root: the directory.
        fault: None: only count.
        count_file: gets one byte for every event; lies outside the directory.
    """
    counter = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    prefix = f"{root.resolve()}{os.sep}"
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        path = _changed_path(event, arguments)
        if path is None or not path.startswith(prefix):
            return
        count += 1
        os.write(counter, b".")
        if fault is None or count < fault.event:
            return
        if fault.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.error != errno.ENOSPC or event not in _FREES_SPACE:
            raise OSError(fault.error, os.strerror(fault.error), path)

    sys.addaudithook(hook)


def _changed_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Absolute path that a call is about to change; None if it changes none."""
    if event == "open":
        path, _, flags = arguments
        if not flags & _WRITING or not isinstance(path, str | bytes):
            return None
        directory = None
    elif event in _CHANGES:
        directory_at, path_at = _CHANGES[event]
        path = arguments[path_at]
        directory = None if directory_at is None else arguments[directory_at]
    else:
        return None
    if isinstance(path, int):  # os.ftruncate
        return str(Path(f"/proc/self/fd/{path}").readlink())
    start = Path.cwd() if directory in (None, -1) else Path(f"/proc/self/fd/{directory}").readlink()
    return os.path.normpath(start / os.fsdecode(path))
