"""Finished results of a long run, in JSON-lines files beside its output, so that a stopped run can be resumed.

Each result has a number. A line holds the number and the fields of the result:

    {"number": 7, "log_prob": -3.25, "num_scored": 2, "num_likeliest": 1}
"""

import glob
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from bloomlm.errors import CheckpointError
from bloomlm.files.atomic import atomic_write
from bloomlm.files.json_text import parse_json

_LOG = logging.getLogger(__name__)

Results = dict[int, dict[str, Any]]


class ResumableResults:
    """The finished results of a run, in hidden files named after its output and a fingerprint of its identity.

    Each process writes its own file; the next run reads all files, whatever its number of processes.

    Args:
        output: the file that the run writes at its end, as given to --output_file.
        identity: everything that decides the results, as text; only a run with the same identity reads them.
        writer: number of this process among those that write results; None: this one writes none.
        on_one: calls a function on one process alone and returns its result on all; every process calls it once.

    Raises:
        CheckpointError: they cannot be written.
    """

    def __init__(
        self,
        output: Path,
        *,
        identity: str,
        writer: int | None = 0,
        on_one: Callable[[Callable[[], Results]], Results] = lambda read: read(),
    ) -> None:
        self._output = output
        self._fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._file: BinaryIO | None = None
        self.done = on_one(self._collect)
        """Number -> result, from stopped runs."""
        if writer is not None:
            try:
                self._file = self._path(writer).open("ab")
            except OSError as error:
                raise self._cannot_write(error) from error

    def add(self, results: Mapping[int, Mapping[str, Any]]) -> None:
        """Add results, and flush them to the file."""
        if self._file is None:
            return
        try:
            self._file.write(_lines(results))
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def remove(self, *, of_all_runs: bool = False) -> None:
        """Delete the files of all processes after the output has been written; one process makes this call.

        A file that cannot be deleted causes a warning, because the output is complete.

        Args:
            of_all_runs: also delete the files of runs with other identities and the same output.
        """
        for path in self._paths("*" if of_all_runs else self._fingerprint):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _LOG.warning("%s is complete, but %s cannot be removed: %s", self._output, path, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _collect(self) -> Results:
        """Read all files, and merge them into the first one."""
        try:
            paths = self._paths(self._fingerprint)
            done: Results = {}
            for path in paths:
                done |= _read(path)
            atomic_write(self._path(0), _lines(done))
            for path in set(paths) - {self._path(0)}:
                path.unlink()
        except OSError as error:
            raise self._cannot_write(error) from error
        except CheckpointError as error:  # names a hidden file, of which the user need not know
            raise self._cannot_write(error.__cause__) from error
        return done

    def _path(self, writer: int) -> Path:
        return self._output.with_name(f".{self._output.name}.{self._fingerprint}.{writer}.partial")

    def _paths(self, fingerprint: str) -> list[Path]:
        return sorted(self._output.parent.glob(f".{glob.escape(self._output.name)}.{fingerprint}.*partial"))

    def _cannot_write(self, error: BaseException | None) -> CheckpointError:
        reason = getattr(error, "strerror", None) or error
        return CheckpointError(
            f"--output_file {self._output} cannot be written: {reason}. Finished results are kept; "
            "the same command resumes the run"
        )


def _lines(results: Mapping[int, Mapping[str, Any]]) -> bytes:
    lines = (json.dumps({"number": number, **result}, ensure_ascii=False) for number, result in results.items())
    return "".join(line + "\n" for line in lines).encode()


def _read(path: Path) -> Results:
    """The results in a file, up to a line that is incomplete because the process or the machine was stopped."""
    done: Results = {}
    with suppress(ValueError, TypeError, KeyError), path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            fields = parse_json(line)
            done[int(fields.pop("number"))] = fields
    return done
