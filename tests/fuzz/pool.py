"""Worker processes that outlive what they run: a crash or a hang costs one mutation, and the next goes on in a new one."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from tests.fuzz.file_kinds import FileKind
from tests.fuzz.worker import Outcome, Runner, sandbox_of

HANG_SECONDS = 10.0
"""Processor time that one mutation may take."""
STUCK_SECONDS = 120.0
"""Wall time after which one is given up, for what waits and computes nothing."""
BATCH = 200
"""Mutations of one process."""
TICKS = os.sysconf("SC_CLK_TCK")
Case = tuple[FileKind, int]


@dataclass
class _Worker:
    """A process and what it has still to do."""

    pid: int
    pipe: Connection
    cases: list[Case]
    scratch: Path
    done: int = 0
    since: float = field(default_factory=time.monotonic)
    cpu: float = 0.0


def run_cases(cases: Sequence[Case], templates: Path, scratch: Path, num_workers: int) -> Iterator[Outcome]:
    """Run mutations, a few at a time.

    Args:
        cases: kinds and seeds.
        templates: as build_templates made it.
        scratch: an empty directory for damaged copies.
        num_workers: number of processes.
    """
    batches = [list(cases[start : start + BATCH]) for start in range(0, len(cases), BATCH)][::-1]
    workers: list[_Worker] = []
    while batches or workers:
        while batches and len(workers) < num_workers:
            workers.append(_start(batches.pop(), templates, scratch))
        ready = wait([worker.pipe for worker in workers], timeout=1.0)
        for worker in list(workers):
            outcome, is_over = _advance(worker, worker.pipe in ready)
            if outcome is not None:
                yield outcome
            if is_over:
                workers.remove(worker)
                if rest := worker.cases[worker.done :]:
                    batches.append(rest)


def _start(cases: list[Case], templates: Path, scratch: Path) -> _Worker:
    ours, theirs = Pipe()
    pid = os.fork()
    if pid:
        theirs.close()
        return _Worker(pid, ours, cases, scratch)
    status = 1
    try:
        ours.close()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        runner = Runner(templates, scratch)
        for kind, seed in cases:
            theirs.send(runner.run(kind, seed))
        status = 0
    finally:
        os._exit(status)  # no exit handlers of the parent


def _advance(worker: _Worker, is_ready: bool) -> tuple[Outcome | None, bool]:
    """Take a worker's next outcome; the second value says whether the process is over."""
    if is_ready:
        try:
            outcome: Outcome = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            return _end(worker)
        worker.done += 1
        worker.since, worker.cpu = time.monotonic(), cpu_seconds(worker.pid)
        return outcome, False
    if cpu_seconds(worker.pid) - worker.cpu > HANG_SECONDS or time.monotonic() - worker.since > STUCK_SECONDS:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        return _broken(worker, "hang", f"more than {HANG_SECONDS:.0f} s"), True
    return None, False


def _end(worker: _Worker) -> tuple[Outcome | None, bool]:
    _, status = os.waitpid(worker.pid, 0)
    worker.pipe.close()
    if worker.done == len(worker.cases):
        return None, True
    how = (
        signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
    )
    return _broken(worker, "crash", how), True


def _broken(worker: _Worker, verdict: str, detail: str) -> Outcome:
    """The outcome of the mutation that a process did not survive."""
    kind, seed = worker.cases[worker.done]
    worker.done += 1
    shutil.rmtree(sandbox_of(worker.scratch, worker.pid, seed), ignore_errors=True)
    return Outcome(kind=kind.name, seed=seed, verdict=verdict, detail=detail, seconds=time.monotonic() - worker.since)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
