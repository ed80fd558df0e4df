"""`--num_processes`: starts the ranks of a verb, waits for them, and reports once how a failed one ended.

It uses PyTorch's elastic launcher. torchrun uses it, too, but takes some flags of the script for abbreviations of its
own flags (`--r` for `--rdzv-backend`).
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from bloomlm.errors import ConfigError
from bloomlm.flags import Flags, flag

DEFAULT_PORT = 29500
SHUTDOWN_SECONDS = 900
"""Time that ranks have to save after SIGTERM before they are killed."""

# Exit statuses of ranks that have printed the reason: an error in flags or files, Ctrl-C, SIGTERM.
_EXPLAINED = (2, 130, 143)


@dataclass(frozen=True, kw_only=True)
class ProcessFlags(Flags):
    """How many processes a job has, and where."""

    num_processes: int = flag(
        "processes", 1, "start this many processes, one for each GPU, on all machines together", minimum=1
    )
    nnodes: int = flag("processes", 1, "number of machines; start the same command on each", minimum=1)
    node_rank: int | None = flag("processes", None, "with several machines: number of this machine, from 0", minimum=0)
    master_addr: str | None = flag("processes", None, "with several machines: address of machine 0")
    master_port: int | None = flag(
        "processes", None, f"with several machines: a free port of machine 0  [default: {DEFAULT_PORT}]", minimum=1
    )


def starts_ranks(flags: ProcessFlags) -> bool:
    """Whether this process is to start others instead of doing the work itself.

    Raises:
        ConfigError: flags that do not go together, or a process that is a rank already.
    """
    num_processes, nnodes = flags.num_processes, flags.nnodes
    if "WORLD_SIZE" in os.environ:
        if num_processes > 1 or nnodes > 1:
            raise ConfigError(
                f"--num_processes {num_processes} starts processes, but torchrun or another launcher has started this "
                f"one already (WORLD_SIZE is {os.environ['WORLD_SIZE']}); leave out --num_processes and --nnodes, or "
                "the launcher"
            )
        return False
    if num_processes % nnodes:
        raise ConfigError(
            f"--num_processes is {num_processes}, --nnodes {nnodes}; --num_processes counts the processes of all "
            "machines, the same number on each"
        )
    places = {"node_rank": flags.node_rank, "master_addr": flags.master_addr, "master_port": flags.master_port}
    if nnodes == 1:
        given = [f"--{name}" for name, value in places.items() if value is not None]
        if given:
            raise ConfigError(f"{', '.join(given)}: not used on one machine; add --nnodes, or leave it out")
    elif flags.node_rank is None or flags.node_rank >= nnodes:
        raise ConfigError(f"--node_rank is {flags.node_rank}; with --nnodes {nnodes} expected 0 to {nnodes - 1}")
    elif flags.master_addr is None:
        raise ConfigError(f"--nnodes {nnodes} needs --master_addr, an address of machine 0 that all machines reach")
    return num_processes > 1


def start_ranks(flags: ProcessFlags, words: Sequence[str], *, ends_by_signal: bool = False) -> None:
    """Start this machine's ranks and wait for them.

    Args:
        flags: checked by `starts_ranks`.
        words: the verb and its flags, as given.
        ends_by_signal: whether a first SIGTERM or SIGINT is the normal end of the verb, with status 0.

    Raises:
        SystemExit: a rank failed, or a signal ended them, with the status of that rank or signal.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    num_local = flags.num_processes // flags.nnodes
    _prepare_environment(torch.get_num_threads() // num_local)
    _silence("torch.distributed.elastic")  # how a rank ended is said below, in one line
    is_alone = flags.nnodes == 1
    port = flags.master_port or DEFAULT_PORT
    with tempfile.TemporaryDirectory(prefix="bloomlm-ranks-") as log_dir:
        config = LaunchConfig(
            min_nodes=flags.nnodes,
            max_nodes=flags.nnodes,
            nproc_per_node=num_local,
            run_id=f"bloomlm-{os.getpid()}" if is_alone else "bloomlm",
            rdzv_backend="c10d" if is_alone else "static",
            rdzv_endpoint="localhost:0" if is_alone else f"{flags.master_addr}:{port}",
            rdzv_configs={} if is_alone else {"rank": flags.node_rank},
            local_addr="localhost" if is_alone else None,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
        )
        try:
            # The ranks read the same run file, and must not start ranks again.
            elastic_launch(config, sys.executable)("-m", "bloomlm", *words, "--num_processes", "1", "--nnodes", "1")
        except ChildFailedError as error:
            raise SystemExit(_tell_end({rank: failure.exitcode for rank, failure in error.failures.items()})) from None
        except SignalException as error:
            is_second = isinstance(error.__context__, SignalException)  # it came while the ranks obeyed the first one
            raise SystemExit(0 if ends_by_signal and not is_second else 128 + error.sigval) from None


def _silence(package: str) -> None:
    """Let all loggers of a package, some of which set their levels, report critical errors only."""
    for name in [package, *logging.root.manager.loggerDict]:
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _prepare_environment(num_threads: int) -> None:
    """Set the variables that the ranks inherit, unless the user has set them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_threads)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # A script in the source tree finds the package beside itself; its ranks find it here.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def _tell_end(exitcodes: Mapping[int, int]) -> int:
    """Print which rank caused the end and how, unless it has printed that itself; return the status to exit with."""
    # The cause is a rank that was killed or has printed an error; SIGTERM came to the others from the launcher.
    rank, exitcode = min(
        exitcodes.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[1] >= 0, item[1] not in _EXPLAINED)
    )
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
        click.echo(f"error: rank {rank} was ended by {name}{hint}", err=True)
        return 128 - exitcode
    if exitcode not in _EXPLAINED:
        click.echo(f"error: rank {rank} ended with status {exitcode}", err=True)
    return exitcode
