"""Kills every command at random moments and at every file-system event, and lets its disk run full or turn read-only.

    unshare --map-root-user --mount python -m tests.kills [--only NAME] [--one_process] [--moments 50] [--events 1000] ...

A row for each command gives the number of faults of each kind that it survived. Below the table stands what went wrong;
the status is 1 then. Without the right to mount a file system, the columns full and read-only stay empty.
"""

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tests.distributed.preload  # noqa: F401
from tests.kills.commands import COMMANDS
from tests.kills.plan import KINDS, Amounts, plan, prepare
from tests.kills.trial import Trials

ROW = "{:22}" + "{:>11}" * (len(KINDS) + 1)


def main() -> int:
    """Run the trials that the flags choose; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the commands to kill")
    parser.add_argument("--one_process", action="store_true", help="leave out the commands of several processes")
    parser.add_argument("--seed", type=int, default=19, help="of the random moments")
    for kind, (default, help) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=default, help=f"{help}  [default: {default}]")
    options = parser.parse_args()
    amounts = Amounts(seed=options.seed, **{kind: getattr(options, kind) for kind in KINDS})
    logging.disable(logging.WARNING)
    in_memory = Path("/dev/shm")  # where fsync costs nothing
    directory = Path(tempfile.mkdtemp(prefix="bloomlm-kills-", dir=in_memory if in_memory.is_dir() else None))
    commands = [command for command in COMMANDS if options.only in command.name]
    if options.one_process:
        commands = [command for command in commands if command.num_ranks == 1]
    wrong: list[str] = []
    started = time.monotonic()
    print(ROW.format("survived", *KINDS, "seconds"))
    try:
        prepare(directory, commands)
        for command in commands:
            wrong += _try(Trials(command, directory), amounts)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print("\n".join(wrong))
    print(f"{len(wrong)} things went wrong in {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


def _try(trials: Trials, amounts: Amounts) -> list[str]:
    """Run all trials of a command, and print its row; returns what went wrong."""
    survived, tried = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    wrong = []
    started = time.monotonic()
    for trial in plan(trials, amounts):
        tried[trial.kind] += trial.num_faults
        found = trial.run()
        if found:
            wrong.append(f"{trials.command.name}, {trial.name}: " + "\n    ".join(found))
        else:
            survived[trial.kind] += trial.num_faults
    cells = [f"{survived[kind]}/{tried[kind]}" if tried[kind] else "" for kind in KINDS]
    print(ROW.format(trials.command.name, *cells, round(time.monotonic() - started)), flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
