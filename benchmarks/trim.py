"""What a trimmed vocabulary gains: a random model of bloom-560m's shape with 250,880, 46,145 and 16,000 tokens.

    python benchmarks/trim.py
    python benchmarks/trim.py --runtimes eager,llama.cpp-F32 --layers 2 --rounds 1   # to try it

46,145 is what Langboat's bloom-*-zh models keep, 16,000 what a model of one language may need. Each pair of a runtime
and a vocabulary runs in a process of its own with the same number of threads, and they take turns. Decoding is greedy,
one and eight sequences after prompts of 128 tokens (tokens per second of the median step). `first_token` is the time
until a process has its first token, imports and loading included; `load` is loading alone. `train` is a full
fine-tuning step on the batches of train_step.py. llama.cpp runs as peers.py says. What a runtime reads is made on first
use. The tables are Markdown: medians over the rounds, and each vocabulary over the whole one.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import generate
import numpy as np
import peers
import train_step
from common import alternate, machine, median, peak_memory_bytes, random_model, record, run_side, size_name

RUNTIMES = "eager,pt2-int8,llama.cpp-F32,llama.cpp-Q8_0,train"
VOCABULARIES = "250880,46145,16000"
PROMPT_TOKENS = 128
WHOLE_IS_LESS = ("file_gb", "load_seconds", "first_token_seconds", "peak_memory_gb", "step_seconds")
KEYS = ("file_gb", "load_seconds", "first_token_seconds", "decode_1", "decode_8", "step_seconds", "peak_memory_gb")


def split(args: argparse.Namespace) -> tuple[str, int]:
    """The runtime and the vocabulary of a side."""
    runtime, _, vocab_size = args.side.partition("@")
    return runtime, int(vocab_size)


def changes(args: argparse.Namespace, vocab_size: int) -> dict[str, int]:
    return {**({"n_layer": args.layers} if args.layers else {}), "vocab_size": vocab_size}


def of_generate(args: argparse.Namespace, runtime: str, vocab_size: int) -> argparse.Namespace:
    """The arguments with which generate.py makes and opens the same."""
    size = size_name(args.size, **changes(args, vocab_size))
    return argparse.Namespace(side=runtime, size=size, layers=0, threads=args.threads)


def prepare(args: argparse.Namespace) -> dict[str, str]:
    """Make what the side reads; tell which packages it misses."""
    runtime, vocab_size = split(args)
    if missing := peers.missing_packages(runtime.partition("-")[0]):
        return {"missing": ", ".join(missing)}
    random_model(args.size, **changes(args, vocab_size))
    if runtime not in ("eager", "train"):
        generate.prepare(of_generate(args, runtime, vocab_size))
    return {"missing": ""}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One side."""
    runtime, vocab_size = split(args)
    if runtime == "train":
        return measure_training(args, vocab_size)
    started = time.perf_counter()
    import torch

    torch.set_num_threads(args.threads)
    random = np.random.default_rng(0)
    given = of_generate(args, runtime, vocab_size)
    result = {"file_gb": file_bytes(given) / 1e9}
    with torch.inference_mode():
        opening = time.perf_counter()
        side = generate.open_side(given)
        result["load_seconds"] = time.perf_counter() - opening
        side.read(prompts(random, 1, 8, vocab_size))
        result["first_token_seconds"] = time.perf_counter() - started
        for rows in (1, 8):
            seconds = side.step_seconds(prompts(random, rows, PROMPT_TOKENS, vocab_size), args.new_tokens)
            result[f"decode_{rows}"] = rows / seconds
    result["peak_memory_gb"] = peak_memory_bytes() / 1e9
    return result


def measure_training(args: argparse.Namespace, vocab_size: int) -> dict[str, float]:
    """A full fine-tuning step; the first batch warms up."""
    import torch

    torch.set_num_threads(args.threads)
    batches = [
        [(tokens % (vocab_size - 4) + 4, num_source) for tokens, num_source in batch]
        for batch in train_step.draw_batches(args.steps + 1, batch_size=2)
    ]
    size = size_name(args.size, **changes(args, vocab_size))
    options = argparse.Namespace(
        size=size,
        tuning="full",
        base_quantization="none",
        device="cpu",
        bf16=False,
        half_weights=False,
        max_grad_norm=0.0,
        batch_size=2,
    )
    steps = train_step.bloomlm_steps(options, batches)
    next(steps)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - start)
    return {"step_seconds": statistics.median(seconds), "peak_memory_gb": peak_memory_bytes() / 1e9}


def file_bytes(given: argparse.Namespace) -> int:
    """Bytes of the weights as this runtime reads them."""
    if given.side == "eager":
        return sum(path.stat().st_size for path in generate.model_directory(given).glob("*.safetensors"))
    path: Path = generate.program(given)
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}.*"))


def prompts(random: np.random.Generator, rows: int, length: int, vocab_size: int) -> list[list[int]]:
    return random.integers(4, vocab_size, (rows, length)).tolist()


def print_tables(results: dict[str, list[dict[str, Any]]], vocabularies: list[str]) -> None:
    """Medians, and what each vocabulary gains over the first."""
    medians = {side: {key: median(found, key) for key in KEYS if key in found[0]} for side, found in results.items()}
    generate.print_row(["", *KEYS])
    generate.print_row(["---"] * (1 + len(KEYS)))
    for side, found in medians.items():
        generate.print_row([side, *(f"{found[key]:.3g}" if key in found else "" for key in KEYS)])
    print("\nHow many times better than with the first vocabulary (size, time and memory: how many times less):\n")
    generate.print_row(["", *KEYS])
    generate.print_row(["---"] * (1 + len(KEYS)))
    for side, found in medians.items():
        runtime, _, vocab_size = side.partition("@")
        if vocab_size != vocabularies[0]:
            whole = medians[f"{runtime}@{vocabularies[0]}"]
            generate.print_row([side, *(gain(key, whole, found) for key in KEYS)])
    print_beside_llama_cpp(medians, vocabularies)


def gain(key: str, whole: dict[str, float], found: dict[str, float]) -> str:
    if key not in found:
        return ""
    return f"{whole[key] / found[key] if key in WHOLE_IS_LESS else found[key] / whole[key]:.2f}"


def print_beside_llama_cpp(medians: dict[str, dict[str, float]], vocabularies: list[str]) -> None:
    """Decoding, ours over llama.cpp's in the same precision and with the same vocabulary."""
    pairs = [("eager", "llama.cpp-F32"), ("pt2-int8", "llama.cpp-Q8_0")]
    rows = [
        [f"{ours} / {peer} @{v}", *(f"{one[key] / other[key]:.2f}" for key in ("decode_1", "decode_8"))]
        for ours, peer in pairs
        for v in vocabularies
        if (one := medians.get(f"{ours}@{v}")) and (other := medians.get(f"{peer}@{v}"))
    ]
    if rows:
        print()
        for row in (["", "decode_1", "decode_8"], ["---"] * 3, *rows):
            generate.print_row(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help="RUNTIME@TOKENS")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--runtimes", default=RUNTIMES)
    parser.add_argument("--vocabularies", default=VOCABULARIES)
    parser.add_argument("--size", default="560m")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.side:
        print("\n" + json.dumps(prepare(args) if args.prepare else measure(args)))
        return
    shared = [f"--{name}={getattr(args, name)}" for name in ("size", "layers", "threads", "new_tokens", "steps")]
    sides, vocabularies = [], args.vocabularies.split(",")
    for runtime in args.runtimes.split(","):
        for side in (f"{runtime}@{vocab_size}" for vocab_size in vocabularies):
            missing = run_side(__file__, side, ["--prepare", *shared], args.threads)["missing"]
            if missing:
                print(f"left out: {side} ({missing})", file=sys.stderr, flush=True)
            else:
                sides.append(side)
    results = alternate(__file__, sides, args.rounds, shared, args.threads)
    print(f"bloom-{args.size} shape, {args.threads} threads, prompts of {PROMPT_TOKENS}; {machine()}\n")
    print_tables(results, vocabularies)
    record(results)


if __name__ == "__main__":
    main()
