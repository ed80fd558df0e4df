"""What the engine is told to do between steps; with tensor parallelism, rank 0 tells all ranks the same."""

import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import torch.distributed as dist

from bloomlm.parallel.mesh import Mesh
from bloomlm.serving.request import GenerationRequest

_HEARTBEAT_SECONDS = 60
"""An idle rank 0 speaks at least this often, so that the others' wait never times out (parallel.launch.TIMEOUT)."""
_PAUSE_SECONDS = 0.001
"""Commands that follow each other faster are a burst, and an idle engine takes them together."""
_MOST_GATHERING_SECONDS = 0.005
"""The longest that the first command of a burst waits for the others."""


@dataclass(frozen=True)
class Submit:
    """Take a request."""

    number: int
    request: GenerationRequest
    num_virtual_tokens: int
    """Virtual tokens before each of its sequences."""


@dataclass(frozen=True)
class Cancel:
    """Drop a request."""

    number: int


@dataclass(frozen=True)
class LoadAdapter:
    """Load an adapter under a name."""

    number: int
    """Number of the command, by which its caller gets the result."""
    name: str
    path: str
    """What the caller gave."""
    directory: Path
    """Where its files are."""


@dataclass(frozen=True)
class UnloadAdapter:
    """Forget an adapter as soon as no request uses it."""

    number: int
    """Number of the command, by which its caller gets the result."""
    name: str


@dataclass(frozen=True)
class Stop:
    """End, after the requests that are there (drains) or at once."""

    drains: bool


Command = Submit | Cancel | LoadAdapter | UnloadAdapter | Stop


class CommandQueue:
    """Commands from any thread of rank 0 to the engines of all ranks. Every rank must make one with the same mesh.

    The exchange takes gloo also where the model computes on GPUs, because a rank that waits for NCCL spins.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._queue: SimpleQueue[Command] = SimpleQueue()
        self._is_main = mesh.is_main
        self._group = None if mesh.is_alone else dist.new_group(backend="gloo")

    def put(self, command: Command) -> None:
        """Add a command; on rank 0."""
        self._queue.put(command)

    def take(self, *, waits: bool) -> list[Command]:
        """The commands of rank 0 since the last call, on every rank.

        Args:
            waits: whether to wait for a command if there is none, without using the processor. Commands that follow it
                at once are then taken with it.
        """
        commands: list[Command] = []
        if self._is_main:
            if waits:
                commands = self._first()
            while True:
                try:
                    commands.append(self._queue.get_nowait())
                except Empty:
                    break
        if self._group is None:
            return commands
        box = [commands]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _first(self) -> list[Command]:
        """Wait for a command, and for those that follow it at once.

        Clients often send several requests together, and the server reads them one after another. A step that began
        with the first of them would read its prompt alone, and the others would wait for its end.
        """
        commands: list[Command] = []
        try:
            commands.append(self._queue.get(timeout=None if self._group is None else _HEARTBEAT_SECONDS))
            end = time.monotonic() + _MOST_GATHERING_SECONDS
            while (left := end - time.monotonic()) > 0:
                commands.append(self._queue.get(timeout=min(left, _PAUSE_SECONDS)))
        except Empty:
            pass
        return commands
