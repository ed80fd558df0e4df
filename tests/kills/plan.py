"""Which faults a command meets."""

import contextlib
import errno
import io
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bloomlm.cli.main import main
from tests.kills.commands import LORA, Command, write_inputs
from tests.kills.disk import can_mount
from tests.kills.faults import Fault
from tests.kills.trial import Trials

# kind -> how many by default, and what it is
KINDS = {
    "moments": (50, "SIGKILL to all processes at random moments of the usual duration"),
    "events": (1000, "SIGKILL to one process at a file-system event; at every event if there are no more than these"),
    "enospc": (50, "no event from a certain one on may take room"),
    "erofs": (50, "no event from a certain one on may change anything"),
    "full": (20, "disks with room for a random part of the output"),
    "readonly": (10, "disks that are read-only when a killed command is started again"),
}


@dataclass(frozen=True)
class Amounts:
    """Number of faults of each kind."""

    seed: int
    moments: int
    events: int
    enospc: int
    erofs: int
    full: int
    readonly: int


@dataclass(frozen=True)
class Trial:
    """A command that is started, stopped, and started again."""

    kind: str
    name: str
    num_faults: int
    run: Callable[[], list[str]]
    """Returns what went wrong."""


def prepare(directory: Path, commands: Iterable[Command]) -> None:
    """Write what commands read, and run each once, so that their forks find every module imported."""
    write_inputs(directory / "inputs")
    work = directory / "warm"
    work.mkdir()
    with contextlib.chdir(work), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for words in (LORA, *(command.words for command in commands if command.num_ranks == 1)):
            with contextlib.suppress(SystemExit):
                main(words.split())
            shutil.rmtree(work / "run", ignore_errors=True)


def plan(trials: Trials, amounts: Amounts) -> Iterator[Trial]:
    """The trials of one command."""
    random_numbers = random.Random(amounts.seed)
    reference = trials.reference
    longest = 3 if trials.command.trains else 1
    remaining = amounts.moments
    while remaining:
        count = min(remaining, random_numbers.randint(1, longest))
        moments = [random_numbers.uniform(0, reference.end.seconds) for _ in range(count)]
        name = "SIGKILL after " + ", ".join(f"{moment:.3f} s" for moment in moments)
        yield Trial("moments", name, count, partial(trials.at_moments, moments))
        remaining -= count
    for kind, count, error in (
        ("events", amounts.events, None),
        ("enospc", amounts.enospc, errno.ENOSPC),
        ("erofs", amounts.erofs, errno.EROFS),
    ):
        for fault in spread_faults(reference.end.events, count, error):
            yield Trial(kind, str(fault), 1, partial(trials.at_event, fault))
    if not can_mount():
        return
    for _ in range(amounts.full):
        size = random_numbers.randrange(reference.size_bytes)
        yield Trial("full", f"on a disk with {size} bytes left", 1, partial(trials.on_full_disk, size))
    for _ in range(amounts.readonly):
        moment = random_numbers.uniform(0, reference.end.seconds)
        name = f"read-only after SIGKILL at {moment:.3f} s"
        yield Trial("readonly", name, 1, partial(trials.on_read_only_disk, moment))


def spread_faults(num_events: tuple[int, ...], count: int, error: int | None) -> list[Fault]:
    """`count` faults spread over all events of all ranks, or one for each event if there are not so many.

    Args:
        num_events: number of events of each rank.
        count: number of faults.
        error: of all faults.
    """
    every = [Fault(event, error, rank) for rank, events in enumerate(num_events) for event in range(1, events + 1)]
    count = min(count, len(every))
    return [every[number * len(every) // count] for number in range(count)]
