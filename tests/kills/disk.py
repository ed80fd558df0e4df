"""A small file system in memory, which runs full or turns read-only."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def small_disk(place: Path, size_bytes: int) -> Iterator[None]:
    """Mount an empty file system of this size at a directory."""
    _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Change options of a mounted file system: its size, or whether it is read-only."""
    _mount("-o", f"remount,{options}", str(place))


@cache
def can_mount() -> bool:
    """Whether this process may mount file systems, as root of its machine or of a user namespace may."""
    with tempfile.TemporaryDirectory() as place:
        try:
            with small_disk(Path(place), 2**16):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
