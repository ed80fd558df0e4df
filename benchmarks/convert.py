"""`bloomlm convert` in both directions beside `cp` of the same bytes: MB/s, and how much memory it takes.

    python benchmarks/convert.py --model 1b7
    python benchmarks/convert.py --model 176b-2-layers --ranks 8

Models of random bf16 bits: the shape of bloom-1b7 (24 layers, 3.4 GB) and that of BLOOM 176B with 2 of its 70 layers
(17 GB; twice that is needed on the disk). Each command starts with its input out of the page cache and ends with its
output on the disk (fsync), the start of Python included. In the end the files are those of the beginning, bit for bit.

Memory is sampled every 5 ms from /proc: anonymous memory (RssAnon), which is the process's own, apart from the pages of
files that are mapped, which the system takes back when it needs them; and all of it (VmHWM) for comparison.
"""

import argparse
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from common import machine, record

MODELS = ("1b7", "176b-2-layers")
LIMIT_FACTOR, LIMIT_BYTES = 2.5, 300e6
SAMPLE_SECONDS = 0.005


def shape(model: str):
    """The BloomConfig of a model's name."""
    from bloomlm.model.config import PUBLISHED_SIZES

    if model == "176b-2-layers":
        return dataclasses.replace(PUBLISHED_SIZES["176b"], n_layer=2)
    return PUBLISHED_SIZES[model]


def make(directory: Path, model: str) -> None:
    """Write the Hugging Face files of a random model."""
    import torch

    from bloomlm.checkpoint.writer import write_model
    from bloomlm.model.bloom import BloomForCausalLM

    config = shape(model)
    # a prime number of values, so that no two rows are the same; no NaN among them, whose bits are not kept everywhere
    values = torch.randn(15_485_863, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with torch.device("meta"):
            shapes = [(name, p.shape) for name, p in BloomForCausalLM(config).named_parameters()]
        for name, size in shapes:
            count = math.prod(size)
            yield name, values.repeat(count // len(values) + 1)[:count].view(size)

    directory.mkdir()
    write_model(directory, config, tensors(), dtype=torch.bfloat16, max_shard_size_bytes=sys.maxsize)


def forget(directory: Path) -> None:
    """Bring files to the disk and out of the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in directory.iterdir())


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp` takes, to the disk."""
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def convert(source: Path, target: Path, flags: list[str]) -> tuple[float, int, int]:
    """Seconds of `bloomlm convert`, its peak anonymous memory, and its peak of all memory."""
    forget(source)
    command = [sys.executable, "-m", "bloomlm", "convert", "--input", str(source), "--output", str(target), *flags]
    anonymous = everything = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        numbers = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        anonymous = max(anonymous, numbers.get("RssAnon", 0) + numbers.get("RssShmem", 0))
        everything = max(everything, numbers.get("VmHWM", 0))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, anonymous, everything


def checksum(directory: Path) -> int:
    """CRC-32 of the weights' files."""
    crc = 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                crc = zlib.crc32(block, crc)
    return crc


def measure(
    what: str, source: Path, target: Path, flags: list[str], args: argparse.Namespace, largest: int
) -> dict[str, list[dict[str, float]]]:
    """Print the lines of one direction, and return its rows; target is left there."""
    num_bytes, copies = size_of(source), target.with_name("copy")
    rows: dict[str, list[dict[str, float]]] = {f"{what}, cp": [], f"{what}, bloomlm": []}
    for _ in range(args.rounds):
        shutil.rmtree(target, ignore_errors=True)
        seconds = copy(source, copies)
        shutil.rmtree(copies)
        ours, anonymous, everything = convert(source, target, flags)
        limit = LIMIT_FACTOR * largest + LIMIT_BYTES
        print(
            f"{what:20}{num_bytes / 1e9:7.2f}{num_bytes / 1e6 / seconds:10.0f}{num_bytes / 1e6 / ours:10.0f}"
            f"{seconds / ours:8.2f}{anonymous / 1e6:12.0f}{(anonymous / largest):9.2f}{limit / 1e6:10.0f}"
            f"{everything / 1e6:10.0f}",
            flush=True,
        )
        rows[f"{what}, cp"].append({"megabytes_per_second": num_bytes / 1e6 / seconds})
        found = {"megabytes_per_second": num_bytes / 1e6 / ours, "own_memory_gb": anonymous / 1e9}
        rows[f"{what}, bloomlm"].append({**found, "of_largest": anonymous / largest})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1b7")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--verify", action="store_true", help="let the conversion read back what it wrote")
    args = parser.parse_args()
    root = Path(os.environ.get("BLOOMLM_BENCH_DIR", tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(dir=root) as name:
        hf, paddle, again = (Path(name) / part for part in ("hf", "paddle", "again"))
        make(hf, args.model)
        config = shape(args.model)
        largest = 2 * config.vocab_size * config.hidden_size
        verify = ["--verify"] if args.verify else []
        print(f"{args.model}, bf16, {config.num_parameters:,} parameters, largest tensor {largest / 1e6:,.0f} MB")
        print(machine())
        print(f"{'':20}{'GB':>7}{'cp MB/s':>10}{'MB/s':>10}{'ratio':>8}{'memory MB':>12}{'largest':>9}{'limit MB':>10}"
              f"{'VmHWM':>10}")  # fmt: skip
        ranks = ["--tensor_parallel_degree", str(args.ranks)] if args.ranks > 1 else []
        rows = measure(f"hf -> paddle ({args.ranks})", hf, paddle, ["--to", "paddle", *ranks, *verify], args, largest)
        before = checksum(hf)
        shutil.rmtree(hf)
        rows |= measure(
            f"paddle ({args.ranks}) -> hf", paddle, again, ["--max_shard_size", "999GB", *verify], args, largest
        )
        print("the same bits" if checksum(again) == before else "OTHER BITS")
        record(rows)


if __name__ == "__main__":
    main()
