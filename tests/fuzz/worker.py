"""One mutation in a process of its own: what it did, how long it took, how much memory, and what it touched."""

import ctypes
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomlm.errors import BloomlmError
from tests.fuzz.file_kinds import FileKind
from tests.fuzz.mutators import MARKER, change_file, flip_bits, mutators_of

READ, REFUSED = "read", "refused"
"""The two outcomes that are right: the damage did no harm, or an error names the file."""
MEMORY_FACTOR, MEMORY_BYTES = 4, 500 * 2**20
"""A file may cost so many times its size and this."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")
CHANGES = ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.symlink", "os.link", "os.rename")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one mutation."""

    kind: str
    seed: int
    verdict: str
    """READ, REFUSED, or the rule that was broken: traceback, kind of error, unnamed, memory, escape, hang, crash."""
    mutation: str = ""
    """What was done to which file."""
    detail: str = ""
    """The error, or what was touched."""
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def is_right(self) -> bool:
        return self.verdict in (READ, REFUSED)

    def __str__(self) -> str:
        return f"[{self.kind}:{self.seed}] {self.verdict} ({self.mutation}): {self.detail}"


class Watch:
    """Notes programs that are run and files outside of a directory that are written, by Python's audit events."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.found: list[str] = []
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in RUNS:
            self.found.append(f"{event} {arguments}")
            raise PermissionError(f"the fuzzer lets nothing run: {event}")
        if event == "open":
            path, _, flags = arguments
            self._check_path(event, path, is_write=bool((flags or 0) & WRITES))
        elif event in CHANGES and not any(
            isinstance(a, int) and a >= 0 for a in arguments[1:3] if event == "os.remove"
        ):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check_path(event, path, is_write=True)

    def _check_path(self, event: str, path: object, *, is_write: bool) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        text = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (not resolved: a link is fine)
        is_ours = f"{text}/".startswith(f"{self.inside}/") and not text.endswith("/secret")
        if (is_write and not is_ours and not text.startswith(("/dev/null", "/proc/self"))) or text.endswith(
            ("/secret", "/etc/passwd")
        ):
            self.found.append(f"{event} {text}")


def mutate(directory: Path, kind: FileKind, rng: random.Random) -> tuple[str, set[str]]:
    """Damage one or two files; returns what was done, and the files' names."""
    found = sorted(
        {
            p.relative_to(directory).as_posix()
            for pattern in kind.damages
            for p in directory.glob(pattern)
            if p.is_file()
        }
    )
    done, names = [], set()
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        pattern = rng.choice(kind.damages)
        name = rng.choice([n for n in found if (directory / n).is_file() and (directory / n).match(pattern)] or found)
        path = directory / name
        names.add(path.name)
        if not path.is_file():
            continue
        if rng.random() < 0.06:
            done.append(f"{name}: {change_file(path.parent, path.name, rng)}")
            continue
        data = path.read_bytes()
        mutator = rng.choice(mutators_of(name, data))
        try:
            path.write_bytes(mutator(data, rng))
        except Exception:  # too damaged already for what knows its structure
            mutator = flip_bits
            path.write_bytes(flip_bits(data, rng))
        done.append(f"{name}: {mutator.__name__}")
    return "; ".join(done), names


class Runner:
    """Runs mutations one after another in this process."""

    def __init__(self, templates: Path, scratch: Path) -> None:
        self.templates, self.scratch = templates, scratch
        self.watch = Watch()

    def run(self, kind: FileKind, seed: int) -> Outcome:
        """Damage a copy of the kind's files, open it, and judge the outcome."""
        rng = random.Random(f"{kind.name}:{seed}")
        sandbox = sandbox_of(self.scratch, os.getpid(), seed)
        directory = sandbox / "given"
        shutil.copytree(self.templates / kind.name, directory)
        (sandbox / "secret").write_bytes(b"nobody reads this")
        try:
            mutation, names = mutate(directory, kind, rng)
            if kind.repair is not None:
                kind.repair(directory)
            return self._judge(kind, seed, sandbox, mutation, names)
        finally:
            self.watch.inside = None
            os.chdir("/")
            shutil.rmtree(sandbox, ignore_errors=True)

    def _judge(self, kind: FileKind, seed: int, sandbox: Path, mutation: str, names: set[str]) -> Outcome:
        directory = sandbox / "given"
        limit = MEMORY_BYTES + MEMORY_FACTOR * sum(
            p.stat().st_size for p in directory.rglob("*") if p.is_file() and not p.is_symlink()
        )
        os.chdir(directory)
        os.environ["BLOOMLM_CACHE"] = str(sandbox / "cache")
        ctypes.CDLL(None).malloc_trim(0)  # memory that the mutation before freed would hide what this one takes
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of this mutation
        resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + limit, resource.RLIM_INFINITY))
        self.watch.inside, self.watch.found = sandbox, []
        started = time.process_time()
        verdict, detail = READ, ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.open(directory, self.templates, sandbox / "out")
        except BloomlmError as error:
            verdict, detail = REFUSED, f"{type(error).__name__}: {error}"
            if not isinstance(error, kind.raises):
                verdict = "kind of error"
            elif not any(name in detail for name in (*names, *kind.named_by, str(sandbox))):
                verdict = "unnamed"
            elif "allocate memory" in detail or len(detail) > 20_000:
                verdict = "memory"
        except MemoryError as error:
            verdict, detail = "memory", described(error)
        except BaseException as error:
            verdict, detail = "traceback", described(error)
        seconds = time.process_time() - started
        self.watch.inside = None
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak = max(0, status_bytes("VmHWM") - before)
        if peak > limit:
            verdict, detail = "memory", f"{peak / 2**20:.0f} MB where {limit / 2**20:.0f} are allowed; {detail}"
        written = sorted(p.name for p in sandbox.iterdir()) + [MARKER] * Path("/tmp", MARKER).exists()
        strange = [name for name in written if name not in ("given", "secret", "out", "cache", "checkpoint-4")]
        if self.watch.found or strange:
            verdict, detail = "escape", f"{self.watch.found} {strange}; {detail}"
        return Outcome(
            kind=kind.name,
            seed=seed,
            verdict=verdict,
            mutation=mutation,
            detail=detail,
            seconds=seconds,
            peak_bytes=peak,
        )


def sandbox_of(scratch: Path, pid: int, seed: int) -> Path:
    """Where a process keeps all files of a mutation."""
    return scratch / f"{pid}-{seed}"


def described(error: BaseException) -> str:
    """An error with the last line of the package that it passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bloomlm/" in frame.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else traceback.format_exc()
    return f"{type(error).__name__}: {str(error)[:300]} at {place}"


def resident_bytes() -> int:
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
