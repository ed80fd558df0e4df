"""A share of `make kill` with fixed moments: a few faults of each kind for every command of one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills.commands import COMMANDS

AMOUNTS = {"moments": 1, "events": 3, "enospc": 2, "erofs": 2, "full": 1, "readonly": 1}
PRIVATE_MOUNTS = ("unshare", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def program() -> list[str]:
    """The program, in a namespace of its own where it may mount, if the system allows that."""
    allowed = shutil.which("unshare") and not subprocess.run([*PRIVATE_MOUNTS, "true"], capture_output=True).returncode
    return [*(PRIVATE_MOUNTS if allowed else ()), sys.executable, "-m", "tests.kills"]


def test_commands_survive_kills_and_full_disks(program: list[str]) -> None:
    # a process of its own, because only one without threads may fork
    amounts = [word for kind, count in AMOUNTS.items() for word in (f"--{kind}", str(count))]
    done = subprocess.run(
        [*program, "--one_process", *amounts],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row[:22].strip(): row[22:].split() for row in done.stdout.splitlines()}
    for command in (command for command in COMMANDS if command.num_ranks == 1):
        survived = sum(int(cell.split("/")[0]) for cell in rows[command.name] if "/" in cell)
        assert survived >= sum(AMOUNTS.values()) - AMOUNTS["full"] - AMOUNTS["readonly"], command.name
