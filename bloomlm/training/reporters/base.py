"""What a program that records metrics gets from a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bloomlm.files.atomic import atomic_write

RUNS_DIRECTORY = "runs"
PROJECT = "bloomlm"
"""Name of the project or experiment unless the program's environment variable names another."""


class Tracker(Protocol):
    """A run that a program records."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics (train/loss, eval/accuracy, ...) after a step; may return before they are stored."""
        ...

    def close(self) -> None:
        """Store what is left, and end the record of the run."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run when it begins or resumes."""

    output_dir: Path
    step: int
    """Number of steps done; 0 for a fresh run."""
    flags: Mapping[str, Any]
    """The resolved flags."""

    @property
    def name(self) -> str:
        """A name for people."""
        return self.output_dir.resolve().name

    @property
    def directory(self) -> Path:
        """A directory for files of trackers."""
        return self.output_dir / RUNS_DIRECTORY

    @property
    def parameters(self) -> dict[str, Any]:
        """The flags that have a value, with lists in place of tuples."""
        given = {name: value for name, value in self.flags.items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def kept_id(self, tracker: str, create: Callable[[], str]) -> str:
        """The id under which a tracker knows this run, created once and kept for when the run resumes."""
        path = self.directory / f"{tracker}_run.txt"
        if not path.is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic_write(path, create() + "\n")
        return path.read_text(encoding="utf-8").strip()
