"""Faults come at the event that they name, before its change is made."""

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kills.faults import Fault, watch
from tests.kills.files import differences, snapshot
from tests.kills.plan import spread_faults


def change(root: Path) -> None:
    """Eight changes, made in different ways."""
    (root / "directory").mkdir()
    (root / "directory" / "file").write_text("content")
    descriptor = os.open(root / "other", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"cut")
    os.ftruncate(descriptor, 0)
    os.close(descriptor)
    (root / "other").rename(root / "renamed")
    (root / "renamed").read_bytes()
    with tempfile.NamedTemporaryFile(dir=root.parent):  # of no interest
        pass
    shutil.rmtree(root / "directory")  # announced, then the file and the directory are removed


CHANGES = [
    {"directory/": b""},
    {"directory/": b"", "directory/file": b"content"},
    {"directory/": b"", "directory/file": b"content", "other": b"cut"},
    {"directory/": b"", "directory/file": b"content", "other": b""},
    {"directory/": b"", "directory/file": b"content", "renamed": b""},
    {"directory/": b"", "directory/file": b"content", "renamed": b""},
    {"directory/": b"", "renamed": b""},
    {"renamed": b""},
]


def in_child(action: Callable[[], None]) -> int:
    """Status of a forked process that does something."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("event", range(1, len(CHANGES) + 1))
@pytest.mark.parametrize("error", [None, errno.EROFS])
def test_a_fault_leaves_the_changes_before_it(tmp_path: Path, event: int, error: int | None) -> None:
    (tmp_path / "root").mkdir()

    def act() -> None:
        watch(tmp_path / "root", Fault(event, error), tmp_path / "count")
        change(tmp_path / "root")

    assert in_child(act) == (-signal.SIGKILL if error is None else error)
    assert snapshot(tmp_path / "root") == ({} if event == 1 else CHANGES[event - 2])
    assert (tmp_path / "count").stat().st_size == event


def test_without_a_fault_events_are_counted(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()

    def act() -> None:
        watch(tmp_path / "root", None, tmp_path / "count")
        change(tmp_path / "root")

    assert in_child(act) == 0
    assert snapshot(tmp_path / "root") == CHANGES[-1]
    assert (tmp_path / "count").stat().st_size == len(CHANGES)


def test_a_full_disk_still_renames_and_removes(tmp_path: Path) -> None:
    for name in ("old", "obsolete"):
        (tmp_path / name).touch()

    def act() -> None:
        watch(tmp_path, Fault(1, errno.ENOSPC), tmp_path / "count")
        (tmp_path / "old").rename(tmp_path / "new")
        (tmp_path / "obsolete").unlink()
        (tmp_path / "more").touch()

    assert in_child(act) == errno.ENOSPC
    assert snapshot(tmp_path) == {"count": b"...", "new": b""}


def test_faults_are_spread_over_all_events_of_all_ranks() -> None:
    assert spread_faults((3, 1), 10, None) == [Fault(1), Fault(2), Fault(3), Fault(1, rank=1)]
    assert spread_faults((4, 2), 3, errno.EROFS) == [
        Fault(1, errno.EROFS),
        Fault(3, errno.EROFS),
        Fault(1, errno.EROFS, rank=1),
    ]


def test_differences_are_named_and_measured_numbers_are_none(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1.5, 2.0), ("b", 2.5, 2.0), ("c", 1.5, 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"loss": {loss}, "eta_seconds": {seconds}}}\n')
    one, same, other = (snapshot(tmp_path / name) for name in "abc")
    assert differences(same, one) == []
    assert differences(other, one) == ["metrics.jsonl differs"]
    assert differences({".x.bloomlm-tmp": b""}, one) == [".x.bloomlm-tmp is left over", "metrics.jsonl is missing"]
