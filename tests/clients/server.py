"""`bloomlm serve` in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

WAIT_SECONDS = 180.0
"""Longer than anything takes on a busy machine."""
SERVE = (sys.executable, "-m", "bloomlm", "serve")


class Server:
    """A server that answers.

    Args:
        process: its process.
        url: its address.
        err: the file with its standard error.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, err: Path) -> None:
        self.process = process
        self.url = url
        self._err = err

    @property
    def err(self) -> str:
        """What it has written to standard error."""
        return self._err.read_text()

    def metric(self, name: str) -> float:
        """A number of /metrics, summed over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=WAIT_SECONDS).text
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert found, f"/metrics has no {name}"
        return sum(map(float, found))

    def stop(self) -> int:
        """Ask it to end, as systemd does; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_SECONDS)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: it never was.
    """
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


@contextmanager
def running(flags: Sequence[str], *, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Context manager that gives a server with these flags, on a free port, once its model is loaded."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                [*SERVE, *flags, "--port", "0"],
                stdout=out_file,
                stderr=err_file,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        try:
            yield Server(process, _address(process, err), err)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], err: Path) -> str:
    def find() -> re.Match[str] | None:
        assert process.poll() is None, f"the server ended: {err.read_text()}"
        return re.search(r"listening on (http://\S+?),", err.read_text())

    wait_for(lambda: find() is not None, "the port")
    found = find()
    assert found is not None
    url = found[1].replace("0.0.0.0", "127.0.0.1")

    def answers() -> bool:
        find()
        return httpx.get(f"{url}/health", timeout=WAIT_SECONDS).status_code == 200

    wait_for(answers, "the model")
    return url
