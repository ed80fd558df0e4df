"""Processes that run functions as the ranks of a job, on gloo. They are started once and serve all tests."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 180

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preload"])


class RankError(AssertionError):
    """A rank raised."""


class RankPool:
    """Runs module-level functions on n ranks."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._directory = tempfile.TemporaryDirectory()

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, joins: bool = True) -> list[Any]:
        """What function(*arguments) returns on each rank, within a default process group.

        With joins=False the function finds what torchrun sets, and joins the ranks by itself.

        Raises:
            RankError: the tracebacks of the ranks that raised, or which ranks did not end.
        """
        while len(self._workers) < world_size:
            self._start()
        store = str(Path(self._directory.name) / uuid.uuid4().hex) if joins else None
        port = _free_port()
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            connection.send_bytes(pickle.dumps((rank, world_size, store, port, function, arguments)))
        results, errors = [], []
        for rank, (process, connection) in enumerate(self._workers[:world_size]):
            if not connection.poll(TIMEOUT_SECONDS):
                errors.append(f"rank {rank} did not end within {TIMEOUT_SECONDS} s")
                continue
            try:
                ok, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                process.join()
                ok, value = False, f"the process ended with {process.exitcode}"
            results.append(value)
            if not ok:
                errors.append(f"rank {rank}: {value}")
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes; the next run starts new ones."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []

    def _start(self) -> None:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, store, port, function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        ours = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ |= ours
        try:
            if store is not None:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=TIMEOUT_SECONDS - 10),
                )
                dist.barrier()  # a rank that fails at once would close connections that others are still making
            result = True, function(*arguments)
            if store is not None:
                dist.destroy_process_group()
        except BaseException:
            result = False, traceback.format_exc()
            if dist.is_initialized():
                dist.destroy_process_group()
        for name in ours:
            os.environ.pop(name, None)
        connection.send_bytes(pickle.dumps(result))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
