"""How much memory this machine has, and how much of it this process may still take.

Control groups (containers, systemd's MemoryMax) allow less than the machine has, each of them for itself and all below
it. Sources: https://docs.kernel.org/filesystems/proc.html (meminfo), https://docs.kernel.org/admin-guide/cgroup-v2.html,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_FILES = {
    "": ("max", "current", "inactive_file"),
    "memory": ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
}
"""Controllers in a line of /proc/self/cgroup -> files of the limit and the use, and the part that can be dropped."""
_NO_LIMIT_BYTES = 2**60
"""From here on, version 1 writes a number where there is no limit."""


@dataclass(frozen=True)
class GroupMemory:
    """The memory of a control group that has a limit."""

    limit_bytes: int
    used_bytes: int
    """What is in use, without files in memory that the system can drop."""


def total_bytes() -> int:
    """The machine's memory."""
    found = _meminfo_bytes("MemTotal")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found


def limit_bytes() -> int | None:
    """The least memory that a control group of this process allows; None without a limit."""
    return min((group.limit_bytes for group in _groups()), default=None)


def free_bytes() -> int:
    """What this process may still take; half of all memory where the system does not say what is free."""
    available = _meminfo_bytes("MemAvailable")
    own = total_bytes() // 2 if available is None else available
    return min([own, *(group.limit_bytes - group.used_bytes for group in _groups())])


def _meminfo_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _groups() -> Iterator[GroupMemory]:
    """The control groups of this process with a limit, one within the other, of version 2 and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in _FILES:
            continue
        root = _CGROUPS / controllers
        own = root / group.lstrip("/")
        for directory in (own, *own.parents):
            if not directory.is_relative_to(root):
                break
            found = _read_group(directory, *_FILES[controllers])
            if found is not None:
                yield found


def _read_group(directory: Path, limit_name: str, usage_name: str, cache_name: str) -> GroupMemory | None:
    try:
        limit = (directory / f"memory.{limit_name}").read_text().strip()
        usage = int((directory / f"memory.{usage_name}").read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _NO_LIMIT_BYTES:
        return None
    return GroupMemory(int(limit), usage - int(stat.get(cache_name, 0)))
