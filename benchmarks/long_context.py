"""Forward and backward over one document, by its length: bloomlm beside transformers, and bloomlm alone to 16k tokens.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --picture docs/images/long_context.png

Beside transformers: the width of bloom-560m, 2 blocks, 128 to 4,096 tokens. Alone: a small model (256 wide, 4 heads, 2
blocks), 1,024 to 16,384 tokens. A vocabulary of 2,048 keeps the head from hiding the blocks; fp32, every weight
learns, the loss is on every token. Prints seconds, the memory a step takes beyond what was held before it, the losses
of both sides and the ratios.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from common import alternate, machine, median, memory_bytes, peak_memory_bytes, random_model, record

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LONG_LENGTHS = (1024, 2048, 4096, 8192, 16384)
WIDE = {"n_layer": 2, "vocab_size": 2048}
SMALL = {"hidden_size": 256, "n_head": 4, **WIDE}


def bloomlm_losses(directory: Path, length: int):
    """Yield the loss of one step after another; gradients are made and thrown away."""
    import torch

    from bloomlm.allocator import keep_freed_memory
    from bloomlm.checkpoint.reader import load_model
    from bloomlm.model.documents import Documents
    from bloomlm.parallel.tensor_parallel import head_of
    from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
    from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

    keep_freed_memory()  # as every command does
    model = load_model(directory, memory_map=False).train()
    tokens = draw(length, model.config.vocab_size)
    labels = torch.cat((tokens[1:], torch.tensor([IGNORE_INDEX])))
    yield None
    while True:
        hidden = model.transformer(tokens, Documents.packed([length]))
        loss = linear_cross_entropy(hidden, head_of(model), labels, scale=1 / (length - 1))
        loss.backward()
        model.zero_grad()
        yield loss.item()


def transformers_losses(directory: Path, length: int):
    """The same with transformers' model and its own loss."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    tokens = draw(length, model.config.vocab_size)[None]
    yield None
    while True:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad()
        yield loss.item()


def draw(length: int, vocab_size: int):
    """The tokens of the document; the same on both sides."""
    import torch

    return torch.randint(4, vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def run(args: argparse.Namespace) -> dict:
    """One side at one length: a step to warm up, then args.steps."""
    losses = {"bloomlm": bloomlm_losses, "transformers": transformers_losses}[args.side]
    steps = losses(random_model("560m", **(SMALL if args.small else WIDE)), args.length)
    next(steps)
    before = memory_bytes()
    loss = next(steps)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "memory_gb": (peak_memory_bytes() - before) / 1e9,
        "loss": loss,
    }


def measure(lengths: tuple[int, ...], sides: tuple[str, ...], args: argparse.Namespace, *, small: bool) -> dict:
    """Side -> (seconds, memory) by length; prints a row for each length."""
    table: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for length in lengths:
        arguments = ["--length", str(length), "--steps", str(args.steps), *(["--small"] if small else [])]
        results = alternate(__file__, sides, args.rounds, arguments)
        row = f"{length:>7,}"
        for side in sides:
            seconds, memory = median(results[side], "seconds"), median(results[side], "memory_gb")
            table[side].append((seconds, memory))
            row += f"  {side} {seconds:8.3f} s {memory:7.3f} GB  loss {results[side][0]['loss']:.5f}"
        if len(sides) == 2:
            theirs, ours = (table[side][-1] for side in sides)
            row += f"  {theirs[0] / ours[0]:5.2f} times as fast, {ours[1] / theirs[1]:.2f} of the memory"
        print(row, flush=True)
    return table


def draw_picture(path: Path, beside: dict, alone: dict) -> None:
    """Seconds and memory by length, and the small model's memory, each beside a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    colors = {"transformers": "#c44e52", "bloomlm": "#4c72b0"}
    for column, (axis, title) in enumerate(zip(axes, ("seconds of a step", "memory of a step, GB"), strict=False)):
        for side, values in beside.items():
            axis.plot(LENGTHS, [value[column] for value in values], "o-", color=colors[side], label=side)
        axis.set(title=title, xscale="log", yscale="log")
        axis.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    axes[0].legend(frameon=False)
    memory = [value[1] for value in alone["bloomlm"]]
    axes[2].plot(LONG_LENGTHS, memory, "o-", color=colors["bloomlm"], label="bloomlm, small model")
    straight = [memory[-1] * n / LONG_LENGTHS[-1] for n in LONG_LENGTHS]
    axes[2].plot(LONG_LENGTHS, straight, ":", color="gray", label="in proportion to the length")
    axes[2].set(title="memory of a step to 16k tokens, GB", xlim=(0, None), ylim=(0, None))
    axes[2].set_xticks(LONG_LENGTHS[1:], [f"{n // 1024}k" for n in LONG_LENGTHS[1:]])
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("tokens of the document")
        axis.spines[["top", "right"]].set_visible(False)
        axis.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("bloomlm", "transformers"))
    parser.add_argument("--length", type=int)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    random_model("560m", **WIDE)
    random_model("560m", **SMALL)
    print(f"one document, forward and backward, fp32, 2 threads; {machine()}")
    beside = measure(LENGTHS, ("transformers", "bloomlm"), args, small=False)
    print("small model")
    alone = measure(LONG_LENGTHS, ("bloomlm",), args, small=True)
    points = {**rows_of("", LENGTHS, beside), **rows_of("small model, ", LONG_LENGTHS, alone)}
    record(points)
    if args.picture:
        draw_picture(args.picture, beside, alone)


def rows_of(start: str, lengths: tuple[int, ...], table: dict) -> dict:
    """Row -> figures, for the report."""
    return {
        f"{start}{length:,} tokens, {side}": [{"seconds": values[place][0], "memory_gb": values[place][1]}]
        for place, length in enumerate(lengths)
        for side, values in table.items()
    }


if __name__ == "__main__":
    main()
