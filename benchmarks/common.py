"""What the benchmarks share: a random model of a published shape on disk, sides as processes, medians and ratios.

Speed does not depend on the values of weights, so the model is random; both sides read the same files. Each side runs
in a process of its own and the sides take turns, so that a drift of the machine falls on both alike.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

MODEL_SEED = 0


def random_model(size: str, **changes: int) -> Path:
    """Directory of a random fp32 model of a published size, written on first use (560m: 2.2 GB).

    Changes replace fields of its config: n_layer=2 makes a model of the same width with two blocks. Once written, it is
    found by size_name(size, n_layer=2) too, where a script passes a size on as one word.
    """
    root = Path(os.environ.get("BLOOMLM_BENCH_DIR", Path(tempfile.gettempdir()) / "bloomlm-bench"))
    directory = root / f"bloom-{size_name(size, **changes)}-random"
    if not (directory / "config.json").exists():
        import dataclasses

        import torch

        from bloomlm.checkpoint.writer import write_model
        from bloomlm.files.atomic import atomic_directory
        from bloomlm.model.bloom import BloomForCausalLM
        from bloomlm.model.config import PUBLISHED_SIZES

        model = BloomForCausalLM(dataclasses.replace(PUBLISHED_SIZES[size], **changes))
        model.init_weights(torch.Generator().manual_seed(MODEL_SEED))
        with atomic_directory(directory) as temporary:
            write_model(temporary, model.config, model.state_dict().items(), dtype=torch.float32)
    return directory


def counted(count: int, what: str) -> str:
    """A number of things in words: 1 stream, 4 streams."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def size_name(size: str, **changes: int) -> str:
    """A published size with its changes as one word."""
    return "-".join([size, *(f"{name}{value}" for name, value in changes.items())])


def peak_memory_bytes(device: str = "cpu") -> int:
    """Most memory this process ever held: torch's tensors on a GPU, or on a CPU the kernel's count.

    VmHWM also counts pages of memory-mapped weights, which both sides have; it is the figure reported.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def memory_bytes() -> int:
    """Memory this process holds now, counted as peak_memory_bytes counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status: this benchmark needs Linux")


def side_parser(description: str | None, sides: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The flags of a script whose sides take turns on a random model: which side a process is, the size, the rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=sides)
    parser.add_argument("--size", default="560m")
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def run_side(script: str, side: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run `script --side SIDE ...` in a fresh process and return the JSON object of its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, script, "--side", side, *arguments]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def alternate(script: str, sides: Sequence[str], rounds: int, arguments: Sequence[str], threads: int = 2) -> dict:
    """Run the sides in turns; returns side -> list of its results, one a round."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for round_number in range(rounds):
        order = sides if round_number % 2 == 0 else list(reversed(sides))
        for side in order:
            results[side].append(run_side(script, side, arguments, threads))
            print(f"  round {round_number + 1} {side}: {summary(results[side][-1])}", file=sys.stderr, flush=True)
    return results


def summary(result: dict[str, Any]) -> str:
    """The scalars of a side's result, short."""
    scalars = {k: v for k, v in result.items() if isinstance(v, (int, float))}
    return ", ".join(f"{key} {value:.4g}" for key, value in scalars.items())


def median(results: Sequence[dict[str, Any]], key: str) -> float:
    """Median over the rounds."""
    return statistics.median(result[key] for result in results)


def autocast(args: Any) -> AbstractContextManager[None]:
    """The context of a forward pass: bf16 where --bf16 is given."""
    import torch

    return torch.autocast(args.device, dtype=torch.bfloat16) if args.bf16 else nullcontext()


def machine(device: str = "cpu") -> str:
    """One line about the machine and the versions."""
    import torch

    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}; Python {platform.python_version()}, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def record(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Hand the result to report.py, if it runs this script: row -> its figures, one a round.

    Where rows are compared at several points, their names are `POINT, SIDE`. What is not a number is left out.
    """
    path = os.environ.get("BLOOMLM_BENCH_ROWS")
    if path:
        numbers = {
            name: [{k: v for k, v in found.items() if isinstance(v, (int, float))} for found in rounds]
            for name, rounds in rows.items()
        }
        Path(path).write_text(json.dumps(numbers))
