"""Finds the device of a process, joins the ranks that a launcher (torchrun, --num_processes) started, and ends them.

If ranks fail, the first one reports its error and the others are silent. A process without a launcher is alone.
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
# What gloo and NCCL report when the other end of a connection is gone, which is never the cause of a failure.
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
EXIT_CODE = 1
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in an exchange."""
GRACE_SECONDS = 15
"""How long a silent rank waits for the one that reports its error: when a rank ends, the launcher ends all."""


def world_size() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_device(name: str | None) -> torch.device:
    """The device that a flag names.

    Args:
        name: cpu, gpu, cuda or cuda:NUMBER; None: a GPU if there is one.

    Raises:
        ConfigError: an unknown kind of device, or there is no GPU.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: unknown kind; expected cpu, gpu or cuda:NUMBER") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: PyTorch finds no GPU here; use --device cpu, or a PyTorch built for CUDA")
    return device


@contextmanager
def joined_ranks(degrees: Degrees, device_type: str) -> Iterator[Mesh]:
    """Context manager that gives the mesh of all ranks of the job.

    Ranks other than rank 0 log errors only. The first rank that raises adds its number to the exception. The others,
    whose exchanges then break, exit silently, and the launcher ends those that still wait.

    Args:
        degrees: how all processes of the job are divided.
        device_type: "cpu" or "cuda", where every process computes; each takes the GPU of its local rank.

    Raises:
        ConfigError: this machine has fewer GPUs than processes.
    """
    if degrees.world_size == 1:
        yield ALONE
        return
    if device_type == "cuda":
        _take_gpu()
    store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    # a job that the launcher restarts finds the store of its previous start
    store = PrefixStore(f"bloomlm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        with _quiet_but_for_errors(rank):
            yield Mesh.over_all_ranks(degrees, device_type)
    except Exception as error:
        if not _is_first_failure(store, error):
            sys.stderr.flush()
            if dist.is_torchelastic_launched():
                time.sleep(GRACE_SECONDS)
            os._exit(EXIT_CODE)  # because threads of broken exchanges would keep the interpreter alive
        error.add_note(f"on rank {rank} of {size}")
        raise
    dist.destroy_process_group()


def _take_gpu() -> None:
    num_processes, num_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if num_processes > num_gpus:
        raise ConfigError(
            f"each of {num_processes} processes on this machine needs a GPU, and PyTorch finds {num_gpus}; start "
            "fewer, or use --device cpu"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def check_agreement(what: Mapping[str, Any], mesh: Mesh) -> None:
    """Raise an error on every rank if the ranks differ in values that must be equal.

    Args:
        what: name -> plain value of this rank.
        mesh: the ranks; all of them must call this.

    Raises:
        ConfigError: a value differs.
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
    """Whether this rank must report its error: the first one to fail, unless it only lost a connection."""
    try:
        if any(text in str(error) for text in LOST_CONNECTION):
            # the rank at the other end reports its error itself, or was killed, which the launcher reports
            return False
        return store.add(FAILED_KEY, 1) == 1
    except Exception:  # the store is gone together with the machine that had it
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
