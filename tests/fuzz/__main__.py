"""Damage files of every kind for some minutes, and print figures: `make fuzz`, or python -m tests.fuzz.

python -m tests.fuzz --minutes 10
python -m tests.fuzz --kind "torch .bin" --seed 17 --count 1    # one mutation again
python -m tests.fuzz --kind "program gguf, new checksums"       # only when it is named
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import torch

from tests.fuzz.file_kinds import KINDS, FileKind, build_templates
from tests.fuzz.pool import Case, run_cases
from tests.fuzz.worker import READ, REFUSED, Outcome

CHUNK = 1000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no more mutations after so many minutes")
    parser.add_argument("--count", type=int, default=sys.maxsize, help="number of mutations at most")
    parser.add_argument("--at_least", type=int, default=0, help="fail unless there were so many")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of each kind")
    parser.add_argument("--kind", action="append", choices=[kind.name for kind in KINDS], help="only these kinds")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def all_cases(kinds: tuple[FileKind, ...], seed: int) -> Iterator[Case]:
    """Kinds in turn, by their weights, each with the next seed."""
    seeds = {kind.name: count(seed) for kind in kinds}
    while True:
        for kind in kinds:
            for _ in range(kind.weight):
                yield kind, next(seeds[kind.name])


def print_figures(outcomes: list[Outcome], seconds: float) -> None:
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    print(f"\n{'file kind':30} {'mutations':>9} {READ:>7} {REFUSED:>8} {'wrong':>6} {'slowest s':>10} {'peak MB':>8}")
    for name, group in by_kind.items():
        print_row(name, group)
    print_row("all", outcomes)
    print(f"\n{len(outcomes):,} mutations in {seconds:.0f} s, {len(outcomes) / seconds:.0f} a second")


def print_row(name: str, group: list[Outcome]) -> None:
    verdicts = Counter(outcome.verdict for outcome in group)
    wrong = len(group) - verdicts[READ] - verdicts[REFUSED]
    slowest, peak = max(o.seconds for o in group), max(o.peak_bytes for o in group) / 2**20
    print(
        f"{name:30} {len(group):9,} {verdicts[READ]:7,} {verdicts[REFUSED]:8,} {wrong:6,} {slowest:10.2f} {peak:8.1f}"
    )


def main() -> int:
    arguments = parse()
    # compiling the operators takes longer than all else, and a forked process must not wait for threads of its parent
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CXX": "no-compiler"}
    torch.set_num_threads(1)
    usual = [kind.name for kind in KINDS if kind.repair is None]
    kinds = tuple(kind for kind in KINDS if kind.name in (arguments.kind or usual))
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="bloomlm-fuzz-") as root:
        templates, scratch = Path(root, "templates"), Path(root, "scratch")
        scratch.mkdir(), templates.mkdir()
        build_templates(templates, kinds)
        gc.freeze()  # a collection in a forked process would copy all pages
        started = time.monotonic()
        cases = islice(all_cases(kinds, arguments.seed), arguments.count)
        while (chunk := list(islice(cases, CHUNK))) and time.monotonic() - started < arguments.minutes * 60:
            for outcome in run_cases(chunk, templates, scratch, arguments.num_workers):
                outcomes.append(outcome)
                if not outcome.is_right:
                    print(outcome, flush=True)
            print(f"{len(outcomes):,} mutations, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        if outcomes:
            print_figures(outcomes, time.monotonic() - started)
    wrong = sum(not outcome.is_right for outcome in outcomes)
    return int(wrong > 0 or len(outcomes) < arguments.at_least)


if __name__ == "__main__":
    sys.exit(main())
