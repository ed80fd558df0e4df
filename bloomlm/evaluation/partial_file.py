"""What is done so far, in JSON-lines files that grow batch by batch: a stopped evaluation goes on from there."""

import glob
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from bloomlm.checkpoint.atomic import atomic_write
from bloomlm.checkpoint.main_rank import on_main
from bloomlm.errors import CheckpointError
from bloomlm.parallel.mesh import ALONE, Mesh

Results = dict[int, dict[str, Any]]


class PartialFile:
    """Results by number, beside the report to be, under names that hold a digest of what decides them.

    Each copy of the model writes a file of its own; the next run, on however many ranks, reads them all.

    Args:
        report: path of the report.
        identity: everything that decides the results, as text.
        mesh: the ranks, all of which must come here.

    Raises:
        CheckpointError: it cannot be written.
    """

    def __init__(self, report: Path, *, identity: str, mesh: Mesh = ALONE) -> None:
        self._report = report
        self._prefix = f".{report.name}.{hashlib.sha256(identity.encode()).hexdigest()[:12]}."
        self._is_main = mesh.is_main
        self._file: BinaryIO | None = None
        self.done: Results = on_main(self._collect, mesh)
        """Number -> result, as earlier runs left them."""
        if mesh.tp_rank == 0:
            try:
                self._file = self._path(mesh.dp_rank).open("ab")
            except OSError as error:
                raise self._cannot_write(error) from error

    def add(self, results: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the results of a batch; they are in the file when this returns."""
        if self._file is None:
            return
        try:
            self._file.write(_lines(results))
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def remove(self) -> None:
        """Delete the files, once the report is there."""
        if self._is_main:
            for path in self._all_paths():
                path.unlink(missing_ok=True)

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _collect(self) -> Results:
        """Everything that is there, put together in the first file."""
        try:
            paths = self._all_paths()
            done: Results = {}
            for path in paths:
                done |= _read(path)
            atomic_write(self._path(0), _lines(done))
            for path in set(paths) - {self._path(0)}:
                path.unlink()
        except OSError as error:
            raise self._cannot_write(error) from error
        return done

    def _path(self, dp_rank: int) -> Path:
        return self._report.with_name(f"{self._prefix}{dp_rank}.partial")

    def _all_paths(self) -> list[Path]:
        return sorted(self._report.parent.glob(f"{glob.escape(self._prefix)}*.partial"))

    def _cannot_write(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"--output_file {self._report} cannot be written: {error.strerror or error}. What is done is kept; the "
            "same command goes on from there"
        )


def _lines(results: Mapping[int, Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps({"number": number, **result}) + "\n" for number, result in results.items()).encode()


def _read(path: Path) -> Results:
    """What a file holds, up to a line that was cut off or lost with the power."""
    done: Results = {}
    with suppress(ValueError, TypeError, KeyError), path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            fields = json.loads(line)
            done[int(fields.pop("number"))] = fields
    return done
