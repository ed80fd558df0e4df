"""Decoding steps of several sides in turns in one process, with a random model of bloom-560m's shape.

    python benchmarks/turns.py --sides pt2-int4,llama.cpp-Q4_0

On a virtual machine the speed of the memory may double within minutes, so that decoding in processes one after another
can hardly be compared. Here every side takes a few steps, then the next side, and so on. The first steps of a turn are
not counted, because threads of the side before may still wait for work in a loop. Tokens per second of the median step,
with one and eight sequences after prompts of 128 tokens; each round is a process of its own. generate.py says what the
sides are, and makes what they read.
"""

import argparse
import json
import statistics

import generate
import numpy as np
from common import machine, median, record, run_side, side_parser, summary

STEPS, UNCOUNTED = 5, 2
"""Steps of a turn, and how many of them are not counted."""


def rates(args: argparse.Namespace, sides: dict[str, generate.Stepping], rows: int) -> dict[str, float]:
    """Tokens per second of each side."""
    prompts = generate.some_prompts(np.random.default_rng(0), rows, generate.PROMPT_TOKENS)
    steps = {name: side.steps(prompts, args.turns * STEPS) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.turns):
        for name in sides:
            seconds[name] += [next(steps[name]) for _ in range(STEPS)][UNCOUNTED:]
    return {name: rows / statistics.median(times) for name, times in seconds.items()}


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One round."""
    import torch

    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        names = args.sides.split(",")
        sides = {name: generate.open_side(argparse.Namespace(**{**vars(args), "side": name})) for name in names}
        found = {rows: rates(args, sides, rows) for rows in (1, 8)}
    return {name: {f"decode_{rows}": rate[name] for rows, rate in found.items()} for name in names}


def main() -> None:
    parser = side_parser(__doc__, ["all"], rounds=3)
    parser.add_argument("--sides", default="pt2,eager,llama.cpp-F32")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=12)
    args = parser.parse_args()
    if args.side:
        print("\n" + json.dumps(measure(args)))
        return
    shared = [f"--{name}={getattr(args, name)}" for name in ("size", "layers", "threads")]
    for name in args.sides.split(","):
        if missing := run_side(generate.__file__, name, ["--prepare", *shared], args.threads)["missing"]:
            raise SystemExit(f"{name} needs {missing}")
    shared += [f"--sides={args.sides}", f"--turns={args.turns}"]
    rounds = []
    for number in range(1, args.rounds + 1):
        rounds.append(run_side(__file__, "all", shared, args.threads))
        for name, found in rounds[-1].items():
            print(f"  round {number} {name}: {summary(found)}", flush=True)
    results = {name: [found[name] for found in rounds] for name in rounds[0]}
    print(f"bloom-{args.size} shape, {args.threads} threads, steps in turns; {machine()}\n")
    first, *others = results
    for name in others:
        ratios = [median(results[first], key) / median(results[name], key) for key in ("decode_1", "decode_8")]
        print(f"{first} : {name}  one sequence {ratios[0]:.2f}, eight {ratios[1]:.2f}")
    record(results)


if __name__ == "__main__":
    main()
