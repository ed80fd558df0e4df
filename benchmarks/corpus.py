"""Raw text: speed of tokenising beside `datasets.map`, and memory by the size of the corpus.

    python benchmarks/corpus.py --text ../shared/data/wikitext-2.valid.tokens
    python benchmarks/corpus.py --text ../shared/data/wikitext-2.valid.tokens --picture docs/images/corpus.png

Speed: paragraphs of the text, drawn again and again to a file of .jsonl, through the tokenizer of the built-in model,
from the file to finished tokens on disk; `datasets` loads the same file and maps it in one process a core.
Memory: what a process holds beyond what it held with the tokenizer loaded; every second while a corpus of 600 MB is
tokenised, and after 20,000 windows were read in the order of training from token files of several sizes, which are
drawn at random, each in a process of its own.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import alternate, machine, median, memory_bytes, peak_memory_bytes, record, run_side

TOKENISED_MB = 600
READ_GB = (0.125, 0.25, 0.5, 1)
SPEED_MB = 50
READ_WINDOWS = 20_000
MAX_LENGTH = 1024
MEAN_DOCUMENT_TOKENS = 600
TARGET_GB = 100
"""The size that the line is continued to."""
ALLOWED_GB = 1


def write_corpus(text: Path, megabytes: float) -> Path:
    """Paragraphs of the text, drawn until the file of rows is large enough."""
    path = work_directory() / f"corpus-{megabytes:g}.jsonl"
    if not path.exists():
        paragraphs = [line for line in text.read_text(encoding="utf-8").splitlines() if len(line) > 200]
        generator, size = random.Random(0), 0
        with path.open("w", encoding="utf-8") as file:
            while size < megabytes * 1e6:
                row = json.dumps({"text": "\n".join(generator.choices(paragraphs, k=3))}, ensure_ascii=False) + "\n"
                size += len(row.encode())
                file.write(row)
    return path


def work_directory() -> Path:
    """Where corpora and caches lie; removed at the end."""
    directory = Path(tempfile.gettempdir()) / "bloomlm-bench" / "corpus"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def tiny_tokenizer():
    """The tokenizer of the built-in model."""
    from bloomlm.checkpoint.source import resolve_source
    from bloomlm.data.tokenizer import Tokenizer

    return Tokenizer.from_directory(resolve_source("builtin:tiny").directory)


def tokenise_bloomlm(path: Path, cache: Path) -> dict:
    """Tokenise a corpus into token files."""
    from bloomlm.data.token_files import file_inputs, load_token_files

    tokenizer = tiny_tokenizer()
    tokenizer.encode_batch(["A first text. " * 100] * 100)
    before, start = memory_bytes(), time.perf_counter()
    samples: list[tuple[int, int]] = []
    done = threading.Event()
    thread = threading.Thread(target=sample, args=(cache, samples, done))
    thread.start()
    files = load_token_files("corpus", file_inputs(path), tokenizer, cache_dir=cache, show_progress=False)
    found = result(start, before, files.size.num_tokens)
    done.set()
    thread.join()
    read = path.stat().st_size / (4 * files.size.num_tokens)
    return found | {"samples": [(read * size / 1e9, (held - before) / 1e9) for size, held in samples]}


def sample(cache: Path, samples: list[tuple[int, int]], done: threading.Event) -> None:
    """Note the size of the tokens on disk and the memory of the process every second."""
    while not done.wait(1.0):
        for tokens in cache.glob("*/tokens.u32"):
            samples.append((tokens.stat().st_size, memory_bytes()))


def tokenise_datasets(path: Path, cache: Path) -> dict:
    """The same with datasets.map and the tokenizer of transformers."""
    import datasets
    from transformers import AutoTokenizer

    from bloomlm.checkpoint.source import resolve_source

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(resolve_source("builtin:tiny").directory)
    end = tokenizer.eos_token_id

    def tokens_of(rows: dict) -> dict:
        encoded = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": [[*ids, end] for ids in encoded["input_ids"]]}

    before, start = memory_bytes(), time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    mapped = rows.map(tokens_of, batched=True, num_proc=2, remove_columns=["text"])
    seconds = time.perf_counter() - start
    num_tokens = sum(map(len, mapped["input_ids"]))
    return result(start, before, num_tokens) | {"seconds": seconds, "tokens_per_second": num_tokens / seconds}


def result(start: float, before: int, num_tokens: int) -> dict:
    """Speed, and the peak of memory beyond what was held before."""
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "added_bytes": peak_memory_bytes() - before,
    }


def read_windows(gigabytes: float, cache: Path) -> dict:
    """Read windows in the order of training from files of random tokens."""
    from bloomlm.data.block_file import BlockWriter
    from bloomlm.data.mixture import Mixture, MixtureOrder, Source
    from bloomlm.data.token_files import ENDS_FILE, LANGUAGES_FILE, MANIFEST_FILE, TOKENS_FILE, TokenFiles
    from bloomlm.data.windows import TextWindows

    directory = cache / f"random-{gigabytes:g}"
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    files = {"<u4": TOKENS_FILE, "<u8": ENDS_FILE, "<u2": LANGUAGES_FILE}
    tokens, ends, languages = (BlockWriter(directory / name, dtype) for dtype, name in files.items())
    num_tokens, num_documents = int(gigabytes * 1e9 / 4), 0
    for start in range(0, num_tokens, 2**22):
        stop = min(start + 2**22, num_tokens)
        tokens.append(generator.integers(4, 4000, stop - start, dtype=np.uint32))
        lengths = generator.geometric(1 / MEAN_DOCUMENT_TOKENS, (stop - start) // MEAN_DOCUMENT_TOKENS) + 2
        inside = np.cumsum(lengths)[np.cumsum(lengths) < stop - start - 2]
        ends.append(np.append(inside + start, stop).astype(np.uint64))
        num_documents += len(inside) + 1
    languages.append(np.zeros(num_documents, dtype=np.uint16))
    tokens.sync(), ends.sync(), languages.sync()
    size = {"num_tokens": num_tokens, "num_documents": num_documents}
    (directory / MANIFEST_FILE).write_text(json.dumps({"size": size}))
    before, start = memory_bytes(), time.perf_counter()
    mixture = Mixture(
        [Source(name="random", windows=TextWindows(TokenFiles(directory, "random"), MAX_LENGTH))], MAX_LENGTH, name="x"
    )
    table_seconds, start = time.perf_counter() - start, time.perf_counter()
    order = MixtureOrder(mixture, 0).of_epoch(0)
    for window in order[:READ_WINDOWS]:
        mixture[int(window)]
    found = {
        "windows": len(mixture),
        "table_seconds": table_seconds,
        "microseconds_a_window": (time.perf_counter() - start) / READ_WINDOWS * 1e6,
        "added_bytes": max(0, memory_bytes() - before),
    }
    shutil.rmtree(directory)
    return found


def draw(points: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Added memory by size of corpus, and the straight lines through the points continued to TARGET_GB."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (name, found), color in zip(points.items(), ("#2563a8", "#d1622b"), strict=True):
        sizes, added = np.array(found).T
        slope, base = np.polyfit(sizes, added, 1)
        axes.plot(sizes, added, "o", color=color, markersize=3, label=f"{name}: measured")
        line = np.geomspace(sizes.min(), TARGET_GB, 50)
        continued = np.maximum(base + slope * line, 1e-4)
        axes.plot(line, continued, "--", color=color, linewidth=1, label="straight line through these, continued")
        print(f"{name}: {base * 1e3:.1f} MB + {slope * 1e3:.3f} MB a GB: {continued[-1]:.3f} GB at {TARGET_GB} GB")
    axes.axhline(ALLOWED_GB, color="#777777", linewidth=0.8)
    axes.set(xscale="log", yscale="log", ylim=(1e-3, 3), xlabel="corpus (GB)", ylabel="added memory (GB)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def measure_growth(text: Path, picture: Path) -> None:
    """Both curves of memory."""
    found = run_side(__file__, "bloomlm", ["--text", str(text), "--size", str(TOKENISED_MB)], 2)
    samples = found.pop("samples")
    print(f"tokenise {TOKENISED_MB} MB: {found}", flush=True)
    points = {"tokenising": samples[len(samples) // 10 :], "reading windows": []}
    for gigabytes in READ_GB:
        found = run_side(__file__, "read", ["--text", str(text), "--size", str(gigabytes)], 2)
        print(f"read {gigabytes} GB: {found}", flush=True)
        points["reading windows"].append((gigabytes, found["added_bytes"] / 1e9))
    draw(points, picture)


def main() -> None:
    """Compare the speeds, or draw the picture; or run one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text whose paragraphs make the corpora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="measure memory, and draw it into this file")
    parser.add_argument("--side", choices=("bloomlm", "datasets", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=float, default=SPEED_MB, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        cache = Path(tempfile.mkdtemp(dir=work_directory()))
        if args.side == "read":
            found = read_windows(args.size, cache)
        else:
            tokenise = {"bloomlm": tokenise_bloomlm, "datasets": tokenise_datasets}[args.side]
            found = tokenise(write_corpus(args.text, args.size), cache)
        shutil.rmtree(cache)
        print(json.dumps(found))
        return
    print(machine())
    if args.picture:
        measure_growth(args.text, args.picture)
    else:
        write_corpus(args.text, SPEED_MB)
        sides = alternate(__file__, ("datasets", "bloomlm"), args.rounds, ["--text", str(args.text)])
        theirs, ours = (median(sides[side], "tokens_per_second") for side in ("datasets", "bloomlm"))
        print(f"tokens/s: datasets.map {theirs:,.0f}, bloomlm {ours:,.0f}, ratio {ours / theirs:.2f}")
        record(sides)
    shutil.rmtree(work_directory())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
