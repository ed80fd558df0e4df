"""The queue of commands: what an idle engine waits for, by a clock that only moves while it is waited for."""

from collections import deque
from collections.abc import Sequence
from math import inf
from queue import Empty
from types import SimpleNamespace

import pytest

from bloomlm.parallel.mesh import ALONE
from bloomlm.serving import commands
from bloomlm.serving.commands import Cancel, Command, CommandQueue


class Arrivals:
    """A queue into which command number n comes at the n-th time, in milliseconds."""

    def __init__(self, times: Sequence[float]) -> None:
        self.now = 0.0
        self._coming = deque(enumerate(times))

    def get(self, timeout: float | None = None) -> Command:
        limit = inf if timeout is None else self.now + 1000 * timeout
        if not self._coming or self._coming[0][1] > limit:
            assert limit < inf, "waited forever"
            self.now = limit
            raise Empty
        number, time = self._coming.popleft()
        self.now = max(self.now, time)
        return Cancel(number)

    def get_nowait(self) -> Command:
        return self.get(timeout=0.0)


def take(monkeypatch: pytest.MonkeyPatch, times: Sequence[float], *, waits: bool) -> tuple[list[int], float]:
    """Numbers of the commands that are taken, and when."""
    queue, arrivals = CommandQueue(ALONE), Arrivals(times)
    monkeypatch.setattr(queue, "_queue", arrivals)
    monkeypatch.setattr(commands, "time", SimpleNamespace(monotonic=lambda: arrivals.now / 1000))
    return [command.number for command in queue.take(waits=waits) if isinstance(command, Cancel)], arrivals.now


@pytest.mark.parametrize(
    ("times", "number", "taken_at"),
    [
        ([7.0], 1, 8.0),
        ([7.0, 7.0, 7.5, 8.25], 4, 9.25),
        ([7.0, 8.5], 1, 8.0),
        ([7.0 + 0.75 * place for place in range(20)], 7, 12.0),
        ([0.0, 0.0, 0.0], 3, 1.0),
    ],
    ids=["alone", "a burst", "later", "without an end", "there already"],
)
def test_an_idle_engine_takes_a_burst_together(
    times: list[float], number: int, taken_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them waits a millisecond behind the last one, and five at most."""
    numbers, now = take(monkeypatch, times, waits=True)
    assert numbers == list(range(number))
    assert now == pytest.approx(taken_at)


def test_an_engine_with_work_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take(monkeypatch, [0.0, 0.0, 0.5], waits=False) == ([0, 1], 0.0)
    assert take(monkeypatch, [], waits=False) == ([], 0.0)
