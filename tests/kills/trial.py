"""One command, undisturbed and then with faults: what must hold after each fault, and after the same command again."""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.kills.commands import Command, write_foreign
from tests.kills.disk import remount, small_disk
from tests.kills.faults import Fault
from tests.kills.files import Snapshot, below, differences, is_hidden, snapshot
from tests.kills.processes import End, run


@dataclass(frozen=True)
class Reference:
    """The undisturbed command."""

    older: Snapshot
    """The directory before it."""
    finished: Snapshot
    """The directory after it."""
    checkpoints: Snapshot
    """All checkpoints of a run that keeps them."""
    end: End
    size_bytes: int
    """Size of the files afterwards."""


class Trials:
    """Trials of one command, in the directory work below a directory of its own."""

    def __init__(self, command: Command, directory: Path) -> None:
        self.command = command
        self.work = directory / re.sub(r"\W+", "-", command.name) / "work"
        self.work.parent.mkdir(parents=True)
        (self.work.parent / "inputs").symlink_to(directory / "inputs")

    @cached_property
    def reference(self) -> Reference:
        """The undisturbed command."""
        checkpoints: Snapshot = {}
        if self.command.all_checkpoints is not None:
            self._start_over()
            self._succeed(f"{self.command.words} {self.command.all_checkpoints}")
            found = below(snapshot(self.work), self.command.output)
            checkpoints = {name: content for name, content in found.items() if name.startswith("run/checkpoint-")}
        self._start_over()
        older = snapshot(self.work)
        end = self._succeed(self.command.words)
        size_bytes = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        return Reference(older, snapshot(self.work), checkpoints, end, size_bytes)

    def at_event(self, fault: Fault) -> list[str]:
        """What goes wrong with a fault at an event; nothing, if the command survives it."""
        foreign = self._start_over()
        end = run(self.command.words, self.work, num_ranks=self.command.num_ranks, fault=fault)
        wrong = self._after_stop(end, foreign)
        if fault.error is not None:
            wrong += self._message(end)
        return [*wrong, *self._after_repeat(foreign)]

    def at_moments(self, seconds: Iterable[float]) -> list[str]:
        """The same with kills after these numbers of seconds, one after the other."""
        foreign = self._start_over()
        wrong, newest = [], 0
        for moment in seconds:
            end = run(self.command.words, self.work, num_ranks=self.command.num_ranks, kill_after=moment)
            wrong += self._after_stop(end, foreign)
            before, newest = newest, max(_checkpoint_steps(snapshot(self.work)), default=0)
            if newest < before:
                wrong.append(f"checkpoint-{before} is lost")
        return [*wrong, *self._after_repeat(foreign)]

    def on_full_disk(self, size_bytes: int) -> list[str]:
        """The same on a disk with so much room left, which grows before the command is repeated."""
        room_bytes = 4 * self.reference.size_bytes + 2**24
        self._empty()
        with small_disk(self.work, room_bytes):
            foreign = self._fill()
            remount(self.work, f"size={self._used_bytes() + size_bytes}")
            end = run(self.command.words, self.work, num_ranks=self.command.num_ranks)
            wrong = [*self._after_stop(end, foreign), *self._message(end)]
            remount(self.work, f"size={room_bytes}")
            return [*wrong, *self._after_repeat(foreign)]

    def on_read_only_disk(self, kill_after: float) -> list[str]:
        """The same on a file system that is read-only after a kill, and writable again before the command is repeated."""
        self._empty()
        with small_disk(self.work, 4 * self.reference.size_bytes + 2**24):
            foreign = self._fill()
            run(self.command.words, self.work, num_ranks=self.command.num_ranks, kill_after=kill_after)
            before = snapshot(self.work)
            remount(self.work, "ro")
            end = run(self.command.words, self.work, num_ranks=self.command.num_ranks)
            wrong = [*self._after_stop(end, foreign), *self._message(end)]
            if end.is_done or snapshot(self.work) != before:
                wrong.append("a read-only disk was written to")
            remount(self.work, "rw")
            return [*wrong, *self._after_repeat(foreign)]

    def _start_over(self) -> dict[Path, tuple[bytes, int]]:
        self._empty()
        return self._fill()

    def _empty(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def _used_bytes(self) -> int:
        return shutil.disk_usage(self.work).used

    def _fill(self) -> dict[Path, tuple[bytes, int]]:
        """Write other programs' files and the older output; returns the former."""
        foreign = write_foreign(self.work)
        kept = self.work.with_name("older")
        if self.command.older is not None and not kept.exists():
            self._succeed(self.command.older)
            shutil.copytree(self.work, kept)
        if kept.exists():
            shutil.copytree(kept, self.work, dirs_exist_ok=True)
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in foreign}

    def _succeed(self, words: str) -> End:
        end = run(words, self.work, num_ranks=self.command.num_ranks)
        assert end.is_done, f"{words}: {end.statuses}\n{end.output}"
        return end

    def _after_stop(self, end: End, foreign: dict[Path, tuple[bytes, int]]) -> list[str]:
        """What must hold whenever the command was stopped: whatever has its name is whole, old or new."""
        wrong = ["it hangs"] if end.hangs else []
        found, reference = snapshot(self.work), self.reference
        shown = _shown(found)
        if self.command.trains:
            wrong += self._damaged_run(shown)
        elif self.command.output.endswith((".json", ".jsonl")):
            names = [name for name in shown.keys() | reference.older.keys() if name.startswith("out")]
            wrong += [
                f"{name} is neither the old nor the new one"
                for name in names
                if shown.get(name) not in (reference.older.get(name), reference.finished.get(name))
            ]
        elif self.command.older is not None:
            output = below(shown, self.command.output)
            if all(output != below(state, self.command.output) for state in (reference.older, reference.finished)):
                wrong.append(f"{self.command.output} is neither the old nor the new one: {sorted(output)}")
        return wrong + self._changed(foreign)

    def _damaged_run(self, shown: Snapshot) -> list[str]:
        """What is wrong with the checkpoints and the merged model of a run."""
        wrong = []
        for step in _checkpoint_steps(shown):
            name = f"run/checkpoint-{step}"
            wrong += differences(below(shown, name), _shown(below(self.reference.checkpoints, name)))
        if merged := below(shown, "run/merged"):
            wrong += differences(merged, below(self.reference.finished, "run/merged"))
        return wrong

    def _changed(self, foreign: dict[Path, tuple[bytes, int]]) -> list[str]:
        return [
            f"{path.name} of another program changed"
            for path, state in foreign.items()
            if not path.exists() or (path.read_bytes(), path.stat().st_mtime_ns) != state
        ]

    def _message(self, end: End) -> list[str]:
        """What is wrong with how a command says that it could not write."""
        if end.is_done:
            return []
        if "Traceback" in end.output:
            return [f"a traceback: {end.output[-1200:]}"]
        message = end.output[end.output.rfind("error") :]
        if 2 not in end.statuses or not message:
            return [f"statuses {end.statuses}, and no error: {end.output[-1500:]}"]
        stem = self.command.output.removesuffix(".jsonl").removesuffix(".json")
        if not re.search(rf"(^|[ /]){stem}([ :./]|$)|{re.escape(str(self.work))}", message, re.MULTILINE):
            return [f"the error names no path: {message}"]
        return []

    def _after_repeat(self, foreign: dict[Path, tuple[bytes, int]]) -> list[str]:
        """What must hold after the same command again: the same bits as without faults, and nothing else."""
        resumes = bool(_checkpoint_steps(snapshot(self.work)))
        end = run(self.command.words, self.work, num_ranks=self.command.num_ranks)
        if not end.is_done:
            return [f"the same command again: {end.statuses}\n{end.output[-3000:]}"]
        wrong = differences(snapshot(self.work), self.reference.finished)
        if resumes and "resuming from" not in end.output:
            wrong.append("the run did not resume")
        return wrong + self._changed(foreign)


def _shown(found: Snapshot) -> Snapshot:
    """The files that are not hidden."""
    return {name: content for name, content in found.items() if not is_hidden(name)}


def _checkpoint_steps(found: Snapshot) -> set[int]:
    """Steps of the checkpoints in the directory of a run."""
    return {int(match[1]) for name in found if (match := re.match(r"run/checkpoint-(\d+)/", name))}
