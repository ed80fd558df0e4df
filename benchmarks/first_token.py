"""Seconds from the start of `bloomlm infer` to its first token: programs of bloom-560m's shape, page cache warm.

    python benchmarks/first_token.py

The prompt is two words. Beside it a process that only imports PyTorch; the processes take turns, and each figure is the
median of --starts. The tokenizer is one of 250,880 tokens (serve_sides.py). Python finds its bytecode, as it does where
it may write it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from common import machine, record
from serve_sides import program

SIDES = ("pt2-int8", "pt2-int4", "pt2")


def seconds(command: list[str], bytecode: str) -> float:
    """From the start of a process to its first line."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not line:
        raise SystemExit(f"{' '.join(command)} failed")
    return took


def infer(args: argparse.Namespace, side: str) -> list[str]:
    path = program(args, side)
    flags = ["--model_dir", str(path.parent), "--model_prefix", path.name, "--max_new_tokens", "1"]
    return [sys.executable, "-m", "bloomlm", "infer", *flags, "--cpu_threads", str(args.threads), "--prompt", "the cat"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--size", default="560m")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--starts", type=int, default=9)
    args = parser.parse_args()
    commands = {side: infer(args, side) for side in args.sides.split(",")}
    commands["import torch"] = [sys.executable, "-c", "import torch; print(torch.ones(2) @ torch.ones(2))"]
    found: dict[str, list[float]] = {side: [] for side in commands}
    with tempfile.TemporaryDirectory() as bytecode:
        for number in range(args.starts + 1):  # the first one writes the bytecode and fills the page cache
            for side, command in commands.items():
                took = seconds(command, bytecode)
                if number:
                    found[side].append(took)
    print(f"process start to first token; {machine()}")
    for side, times in found.items():
        print(f"{side:14}{statistics.median(times):6.2f} s (from {min(times):.2f} to {max(times):.2f})")
    record({side: [{"first_token_seconds": statistics.median(times)}] for side, times in found.items()})


if __name__ == "__main__":
    main()
