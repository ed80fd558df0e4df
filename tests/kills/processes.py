"""A command as forked processes of this one, which has imported everything: a start takes milliseconds, not seconds."""

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from bloomlm.cli.main import main
from tests.kills.faults import Fault, watch

HANG_SECONDS = 300
"""Far more than any command here takes on a busy machine."""


@dataclass(frozen=True)
class End:
    """How a command ended."""

    statuses: tuple[int, ...]
    """Exit status of each rank; minus the number of the signal that ended it."""
    seconds: float
    events: tuple[int, ...]
    """Number of file-system events of each rank."""
    output: str
    """What the ranks printed."""
    hangs: bool

    @property
    def is_done(self) -> bool:
        """Whether every rank was successful."""
        return all(status == 0 for status in self.statuses)


def run(
    words: str, work: Path, *, num_ranks: int = 1, fault: Fault | None = None, kill_after: float | None = None
) -> End:
    """Run a command in the directory work, and wait for its end. Beside work it leaves what it printed.

    Args:
        words: the verb and its flags.
        work: its directory; its cache is the directory cache there.
        num_ranks: number of processes, as a launcher starts them; when one is killed, the others are, too.
        fault: what happens to one of the ranks.
        kill_after: seconds after which all ranks are killed; None: never.
    """
    printed = work.with_name("printed.txt")
    printed.write_bytes(b"")
    counts = [work.with_name(f"events-{rank}") for rank in range(num_ranks)]
    port = _free_port()
    started = time.monotonic()
    pids = [
        _fork(words, work, printed, _rank_variables(rank, num_ranks, port), fault, rank, counts[rank])
        for rank in range(num_ranks)
    ]
    statuses, hangs = _wait(pids, started, kill_after)
    return End(
        statuses=tuple(statuses[pid] for pid in pids),
        seconds=time.monotonic() - started,
        events=tuple(path.stat().st_size if path.exists() else 0 for path in counts),
        output=printed.read_text(errors="replace"),
        hangs=hangs,
    )


def _wait(pids: list[int], started: float, kill_after: float | None) -> tuple[dict[int, int], bool]:
    """Exit statuses by process, and whether some process did not end by itself."""
    statuses: dict[int, int] = {}
    hangs = False
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        is_late = elapsed > HANG_SECONDS
        if is_late or (kill_after is not None and elapsed > kill_after) or -signal.SIGKILL in statuses.values():
            hangs = hangs or is_late
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
                statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)
    return statuses, hangs


def _fork(
    words: str,
    work: Path,
    printed: Path,
    variables: dict[str, str],
    fault: Fault | None,
    rank: int,
    count_file: Path,
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid != 0:
        return pid
    status = 1
    try:
        file = os.open(printed, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(work)
        os.environ.update(variables, BLOOMLM_CACHE=str(work / "cache"))
        faulthandler.dump_traceback_later(HANG_SECONDS - 5)
        watch(work, fault if fault is not None and fault.rank == rank else None, count_file)
        main(words.split())
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    if num_ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
