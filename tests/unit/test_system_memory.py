"""What the system says about its memory, and what the control groups of a process allow."""

from pathlib import Path

import pytest

from bloomlm import system_memory
from bloomlm.system_memory import GroupMemory, free_bytes, limit_bytes, total_bytes

GROUP = {"memory.max": "100", "memory.current": "70", "memory.stat": "anon 9\ninactive_file 25"}
GROUP_V1 = {"memory.limit_in_bytes": "90", "memory.usage_in_bytes": "70", "memory.stat": "total_inactive_file 3"}


def write_group(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (GROUP, GroupMemory(100, 45)),
        ({**GROUP, "memory.max": "max"}, None),
        ({"memory.max": "100"}, None),
        ({**GROUP, "memory.max": str(2**63 - 4096)}, None),
    ],
)
def test_limit_of_a_control_group(tmp_path: Path, files: dict[str, str], expected: GroupMemory | None) -> None:
    write_group(tmp_path, files)
    assert system_memory._read_group(tmp_path, "max", "current", "inactive_file") == expected


@pytest.mark.parametrize(
    ("lines", "limit", "free"),
    [
        ("0::/slice/service", 60, -10),  # the outer group counts too
        ("0::/slice", 60, -10),
        ("0::/elsewhere", None, None),
        ("5:cpu:/slice\n3:memory:/service", 90, 23),
        ("3:memory:/a/path/outside/of/this/container", 80, 10),  # where the own group is mounted as the root
    ],
)
def test_the_smallest_of_nested_groups_counts(
    lines: str, limit: int | None, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_group(tmp_path / "slice", {**GROUP, "memory.max": "60", "memory.stat": "anon 1"})
    write_group(tmp_path / "slice" / "service", GROUP)
    write_group(tmp_path / "memory" / "service", GROUP_V1)
    if "outside" in lines:
        write_group(tmp_path / "memory", {**GROUP_V1, "memory.limit_in_bytes": "80", "memory.stat": "anon 1"})
    monkeypatch.setattr(system_memory, "_CGROUPS", tmp_path)
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: lines if str(path) == "/proc/self/cgroup" else read_text(path))
    assert limit_bytes() == limit
    assert free_bytes() == free or (free is None and free_bytes() > 1000)


def test_this_machine_has_free_memory() -> None:
    assert 0 < free_bytes() <= total_bytes()
    limit = limit_bytes()
    assert limit is None or limit > 0
