"""Write to files in a thread, so that the next block is computed while the last one is written."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO


class WriteBehind:
    """One thread that runs actions in order; at most one is pending, so little memory is held.

    A context manager: all actions are done when it exits. The next call, or the exit, raises the error of an action.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._last: Future[object] | None = None

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()

    def do(self, action: Callable[[], object]) -> None:
        """Start an action when the last one is done."""
        self.wait()
        self._last = self._pool.submit(action)

    def wait(self) -> None:
        """Wait until all actions are done and their data is released."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


class FileBehind:
    """A binary file with the two methods that writers use, run in the thread."""

    def __init__(self, file: BinaryIO, behind: WriteBehind) -> None:
        self._file, self._behind = file, behind

    def seek(self, offset: int) -> None:
        """Move to an offset."""
        self._behind.do(lambda: self._file.seek(offset))

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes, which must not change afterwards; returns their number."""
        self._behind.do(lambda: self._file.write(data))
        return len(data)
