"""How time and memory of a training step grow: bloomlm beside transformers (+ PEFT), by length, batch and model size.

    python benchmarks/growth.py --tuning full
    python benchmarks/growth.py --tuning lora --picture docs/images/growth_lora.png

One document of 128 to 4,096 tokens; 1 to 8 documents of 256; models from 4 blocks of width 256 to bloom-560m's shape,
all with BLOOM's vocabulary. fp32, 2 threads, labels on the last fifth of the tokens, AdamW. Every point has a process
of its own on each side; printed are the median of a few steps after one to warm up, and the process's peak memory.
Beyond 2,048 tokens a step transformers' logits and attention scores need more than 24 GB, so bloomlm goes on alone.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import machine, peak_memory_bytes, random_model, record, run_side, size_name, summary
from train_step import bloomlm_steps, transformers_steps

STEPS = {"transformers": transformers_steps, "bloomlm": bloomlm_steps}
MOST_TOKENS = {"transformers": 2048, "bloomlm": 4096}
VOCAB_SIZE = 250_880
MEDIUM = {"n_layer": 8, "hidden_size": 768, "n_head": 12}
SHAPES = (
    {"n_layer": 4, "hidden_size": 256, "n_head": 4},
    {"n_layer": 6, "hidden_size": 512, "n_head": 8},
    MEDIUM,
    {"n_layer": 24, "hidden_size": 1024, "n_head": 16},
)
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BATCH_SIZES = (1, 2, 4, 8)
LEARNED_PART = 5
"""One token in so many has a label."""
LONGEST_SECONDS = 12
"""No further step begins after so long, so that slow points have fewer."""


class Point(NamedTuple):
    """What a step computes."""

    size: str
    length: int = 256
    batch_size: int = 1


def points() -> dict[str, dict[int, Point]]:
    """What grows -> each value of it and its point."""
    medium = size_name("560m", **MEDIUM)
    return {
        "tokens of one document": {length: Point(medium, length=length) for length in LENGTHS},
        "documents of 256 tokens": {number: Point(medium, batch_size=number) for number in BATCH_SIZES},
        "million parameters": {millions(shape): Point(size_name("560m", **shape)) for shape in SHAPES},
    }


def millions(shape: dict[str, int]) -> int:
    """Parameters of a shape, without biases and norms."""
    width = shape["hidden_size"]
    return round((VOCAB_SIZE * width + shape["n_layer"] * 12 * width**2) / 1e6)


def run(args: argparse.Namespace) -> dict:
    """One side at one point."""
    num_source = args.length - args.length // LEARNED_PART
    random = np.random.default_rng(0)
    batches = [
        [(random.integers(4, VOCAB_SIZE, args.length), num_source) for _ in range(args.batch_size)]
        for _ in range(args.steps + 1)
    ]
    steps = STEPS[args.side](args, batches)
    first_loss, _ = next(steps)
    seconds: list[float] = []
    while len(seconds) < args.steps and sum(seconds) < LONGEST_SECONDS:
        start = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_gb": peak_memory_bytes() / 1e9, "loss": first_loss}


def measure(args: argparse.Namespace) -> dict[str, dict[int, dict[str, dict]]]:
    """What grows -> value -> side -> its result; a point that belongs to several is measured once."""
    done: dict[tuple[str, Point], dict] = {}
    table: dict[str, dict[int, dict[str, dict]]] = {}
    for name, values in points().items():
        table[name] = {}
        print(f"{name:>24}{'transformers':>22}{'bloomlm':>22}   ratios")
        for number, (value, point) in enumerate(values.items()):
            row = table[name][value] = {}
            for side in list(STEPS)[:: 1 if number % 2 else -1]:
                if point.length * point.batch_size > MOST_TOKENS[side]:
                    continue
                if (side, point) not in done:
                    arguments = [f"--{key}={part}" for key, part in point._asdict().items()]
                    arguments += [f"--tuning={args.tuning}", f"--steps={args.steps}"]
                    done[side, point] = run_side(__file__, side, arguments, threads=2)
                    print(f"  {point} {side}: {summary(done[side, point])}", file=sys.stderr, flush=True)
                row[side] = done[side, point]
            print(describe(value, row), flush=True)
    return table


def describe(value: int, row: dict[str, dict]) -> str:
    """A line of the table."""
    cells = [f"{row[s]['seconds']:9.3f} s {row[s]['peak_gb']:7.2f} GB" if s in row else f"{'-':>22}" for s in STEPS]
    if len(row) < len(STEPS):
        return f"{value:>24,}{''.join(cells)}"
    theirs, ours = (row[side] for side in STEPS)
    if abs(theirs["loss"] - ours["loss"]) > 1e-4 * theirs["loss"]:
        raise SystemExit(f"the sides do not compute the same: losses {theirs['loss']} and {ours['loss']}")
    faster, smaller = theirs["seconds"] / ours["seconds"], ours["peak_gb"] / theirs["peak_gb"]
    return f"{value:>24,}{''.join(cells)}   {faster:.2f} times as fast, {smaller:.2f} of the memory"


def draw_picture(path: Path, table: dict[str, dict[int, dict[str, dict]]], title: str) -> None:
    """Seconds above, peak memory below; a column for each thing that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    colors = {"transformers": "#c44e52", "bloomlm": "#4c72b0"}
    medium = f"{millions(MEDIUM)} million parameters"
    fixed = (f"one document, {medium}", f"several documents, {medium}", "one document of 256 tokens")
    figure, axes = plt.subplots(2, len(table), figsize=(11, 6), sharex="col", sharey="row", constrained_layout=True)
    for column, (name, values) in enumerate(table.items()):
        for line, (key, label) in enumerate((("seconds", "seconds of a step"), ("peak_gb", "peak memory, GB"))):
            axis = axes[line][column]
            for side, color in colors.items():
                found = {value: row[side][key] for value, row in values.items() if side in row}
                axis.plot(list(found), list(found.values()), "o-", color=color, label=side)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(list(values), [f"{value:,}" for value in values])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator()
            )
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
        axes[0][column].set_title(fixed[column], fontsize="medium")
        axes[1][column].set_xlabel(name)
    axes[0][0].legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=tuple(STEPS))
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--size")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    parser.set_defaults(
        base_quantization="none", device="cpu", bf16=False, half_weights=False, max_grad_norm=0.0
    )  # what else train_step.py reads
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    for shape in SHAPES:
        random_model("560m", **shape)
    title = f"a step of {args.tuning} fine-tuning, fp32, 2 threads"
    print(f"{title}; {machine()}")
    table = measure(args)
    record(
        {
            f"{value:,} {name}, {side}": [{"seconds": found["seconds"], "peak_memory_gb": found["peak_gb"]}]
            for name, values in table.items()
            for value, row in values.items()
            for side, found in row.items()
        }
    )
    if args.picture:
        draw_picture(args.picture, table, title)


if __name__ == "__main__":
    main()
