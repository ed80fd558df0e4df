"""Write to files in a thread, so that the next block is made while the last one goes to the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO


class WriteBehind:
    """One thread that does what it is given, in order; at most one thing waits for it, so memory stays small.

    A context: on leaving it everything is done. An error in the thread is raised by the next call, or on leaving.
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
        """Hand over an action as soon as the last one is done."""
        self.wait()
        self._last = self._pool.submit(action)

    def wait(self) -> None:
        """Come back when everything is done, and nothing is held any more."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


class FileBehind:
    """The part of a binary file that writers use, its bytes written behind."""

    def __init__(self, file: BinaryIO, behind: WriteBehind) -> None:
        self._file, self._behind = file, behind

    def seek(self, offset: int) -> None:
        """Go to a place."""
        self._behind.do(lambda: self._file.seek(offset))

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes, which must not change from now on; returns how many."""
        self._behind.do(lambda: self._file.write(data))
        return len(data)
