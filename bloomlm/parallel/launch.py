"""Join the ranks that a launcher started, and end together: the first rank that fails says why, the others are quiet.

Without a launcher (torchrun, --num_processes) a process is alone, and nothing here costs it anything.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from bloomlm.errors import ConfigError
from bloomlm.parallel.mesh import ALONE, Degrees, Mesh

FAILED_KEY = "failed"
# What gloo and NCCL say when the other end of a connection is gone: never the cause.
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
EXIT_CODE = 1
GRACE_SECONDS = 15
"""How long a rank that has nothing to say waits for the one that has: when a rank ends, the launcher ends all."""


def world_size() -> int:
    """The number of processes of this job, as the launcher says; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_device(name: str | None) -> torch.device:
    """The device that a flag names.

    Args:
        name: cpu, gpu, cuda or cuda:NUMBER; None: a GPU if there is one.

    Raises:
        ConfigError: no such kind, or no GPU.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such kind; expected cpu, gpu or cuda:NUMBER") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: PyTorch finds no GPU here; use --device cpu, or a PyTorch built for CUDA")
    return device


@contextmanager
def joined_ranks(degrees: Degrees, device_type: str, timeout: timedelta = timedelta(minutes=30)) -> Iterator[Mesh]:
    """The mesh of all ranks of the job, for as long as the block lasts.

    Ranks other than the first log errors only. If a rank raises, the first to do so says that it was that rank; the
    others, whose exchanges then break, exit without a word, and the launcher ends those that still wait.

    Args:
        degrees: for all processes of the job.
        device_type: "cpu" or "cuda", on which every process computes; of GPUs, each takes that of its local rank.
        timeout: for which a rank waits for the others in an exchange.

    Raises:
        ConfigError: this machine has fewer GPUs than processes.
        SystemExit: another rank failed.
    """
    if degrees.world_size == 1:
        yield ALONE
        return
    if device_type == "cuda":
        _take_gpu()
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    # a job that the launcher starts again finds the store of its last life
    store = PrefixStore(f"bloomlm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        with _quiet_but_for_errors(rank):
            yield Mesh.over_all_ranks(degrees, device_type)
    except Exception as error:
        if not _is_first_failure(store, error):
            sys.stderr.flush()
            if dist.is_torchelastic_launched():
                time.sleep(GRACE_SECONDS)
            os._exit(EXIT_CODE)  # threads of broken exchanges would keep the interpreter from ending
        error.add_note(f"on rank {rank} of {size}")
        raise
    dist.destroy_process_group()


def _take_gpu() -> None:
    num_processes, num_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if num_processes > num_gpus:
        raise ConfigError(
            f"{num_processes} processes on this machine need a GPU each, and PyTorch finds {num_gpus}; start fewer, or "
            "compute with --device cpu"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def check_agreement(what: Mapping[str, Any], mesh: Mesh) -> None:
    """Refuse to begin where ranks differ in what must be the same.

    Args:
        what: name -> plain value of this rank.
        mesh: the ranks, all of which must come here.

    Raises:
        ConfigError: they differ, on every rank.
    """
    if mesh.is_alone:
        return
    found: list[dict[str, Any]] = [{} for _ in range(mesh.degrees.world_size)]
    dist.all_gather_object(found, dict(what))
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if other.get(name) != value:
                raise ConfigError(
                    f"rank {rank} has {name} {other.get(name)!r}, rank 0 has {value!r}; start all processes with the "
                    "same flags, files and version"
                )


def agreed(flag: bool, mesh: Mesh) -> bool:
    """Whether a flag is set on any rank."""
    if mesh.device_mesh is None:
        return flag
    return bool(mesh.sum_over(torch.tensor(int(flag), device=mesh.device_mesh.device_type)))


def _is_first_failure(store: Store, error: Exception) -> bool:
    """Whether this rank is the one to tell; a lost connection is told only if nobody told a cause."""
    try:
        if any(text in str(error) for text in LOST_CONNECTION):
            # the one that left has said why, or says it in a moment, or was killed, which the launcher says
            return False
        return store.add(FAILED_KEY, 1) == 1
    except Exception:  # the store went with the machine that had it
        return not any(text in str(error) for text in LOST_CONNECTION)


@contextmanager
def _quiet_but_for_errors(rank: int) -> Iterator[None]:
    if rank == 0:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
