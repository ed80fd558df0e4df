"""Generation with a random model of bloom-560m's shape: bloomlm and its exported programs beside other runtimes.

    python benchmarks/generate.py --sides transformers,llama.cpp-Q8_0,pt2,pt2-int8

Each side runs in a process of its own with the same number of threads, and the sides take turns. Decoding is greedy,
one and eight sequences after prompts of 128 tokens (tokens per second of the median step; CTranslate2: of the mean
one); prefill reads one prompt of 512. `error` is ||a - b|| / ||b|| of the logits against transformers' in fp32, after a
prompt of 128 tokens and after each of 8 given ones. `bandwidth` is the share of the memory's measured read speed that
decoding one sequence reaches: bytes of the weights, read once for a token. First token: with imports and loading.

What sides read is made on first use, beside the random model, which takes minutes each. A peer that is not installed
is left out with a note; peers.py says how each is run. The tables are Markdown: medians over the rounds, and ours over
each peer. --layers 2 tries it all on a short model.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import peers
from common import alternate, machine, median, peak_memory_bytes, random_model, record, run_side

OURS = ("eager", "eager-bf16", "pt2", "pt2-bf16", "pt2-int8", "pt2-int4")
SIDES = (
    "transformers,llama.cpp-F32,llama.cpp-Q8_0,llama.cpp-Q4_0,ctranslate2-float32,ctranslate2-int8,"
    "onnxruntime,openvino-fp32,openvino-int8,eager,pt2,pt2-int8"
)
PROMPT_TOKENS = 128
LONG_TOKENS = 512
FORCED_TOKENS = 8
RATES = ("decode_1", "decode_8", "prefill_512")
KEYS = (*RATES, "bandwidth", "error", "peak_memory_gb", "first_token_seconds", "read_gb_per_second")
BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.0, "Q8_0": 34 / 32, "int4": 18 / 32, "Q4_0": 18 / 32}
"""Of matrices, scales of groups included; 4 where nothing is said."""


class Side(Protocol):
    """What is measured: peers.CTranslate2, or anything with prefill and decode_step in Stepping."""

    def read(self, prompts: list[list[int]]) -> None:
        """Read prompts up to their first new token."""

    def step_seconds(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds of a typical step after the prompts."""

    def logits(self, prompt: list[int], forced: list[int]) -> np.ndarray:
        """[1 + forced, V] after the prompt and after each further token."""


class Stepping:
    """A model that reads prompts and then takes steps."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def read(self, prompts: list[list[int]]) -> None:
        self._model.prefill(prompts, 1)

    def steps(self, prompts: list[list[int]], new_tokens: int) -> Iterator[float]:
        """Seconds of each step after the prompts, which is taken when it is asked for."""
        import torch

        batch, logits = self._model.prefill(prompts, new_tokens)
        for _ in range(new_tokens):
            start = time.perf_counter()
            logits = batch.decode_step(torch.as_tensor(logits).argmax(dim=-1))
            yield time.perf_counter() - start

    def step_seconds(self, prompts: list[list[int]], new_tokens: int) -> float:
        return statistics.median(self.steps(prompts, new_tokens))

    def logits(self, prompt: list[int], forced: list[int]) -> np.ndarray:
        import torch

        batch, logits = self._model.prefill([prompt], len(forced))
        rows = [logits, *(batch.decode_step(torch.tensor([token])) for token in forced)]
        return np.concatenate([torch.as_tensor(row).float().numpy() for row in rows])


def model_directory(args: argparse.Namespace) -> Path:
    return random_model(args.size, **({"n_layer": args.layers} if args.layers else {}))


def made(args: argparse.Namespace) -> Path:
    """Directory of what is made from the random model."""
    model = model_directory(args)
    return model.with_name(f"{model.name}-generate")


def prepare(args: argparse.Namespace) -> None:
    """Make what the side reads, unless it is there."""
    kind, _, variant = args.side.partition("-")
    directory = made(args) / args.side
    if kind in ("ctranslate2", "openvino") and not directory.exists():
        from bloomlm.files.atomic import atomic_directory

        with atomic_directory(directory) as temporary:
            convert = peers.convert_ctranslate2 if kind == "ctranslate2" else peers.convert_openvino
            convert(model_directory(args), temporary, variant)
    elif kind in ("pt2", "llama.cpp", "onnxruntime"):
        program(args)
    elif kind == "transformers" and not reference_path(args).exists():
        reference_path(args).parent.mkdir(exist_ok=True)
        np.save(reference_path(args), open_side(args).logits(*given_tokens()))


def program(args: argparse.Namespace) -> Path:
    """A program of the random model, exported on first use."""
    kind, _, variant = args.side.partition("-")
    form = {"llama.cpp": "gguf", "onnxruntime": "onnx"}.get(kind, kind)
    precision = {"Q8_0": "int8", "Q4_0": "int4", "F32": "none"}.get(variant, variant or "none")
    path = made(args) / f"{form}-{precision}"
    if not path.with_name(f"{path.name}.json").exists():
        import torch

        from bloomlm.checkpoint.reader import load_model
        from bloomlm.checkpoint.source import resolve_source
        from bloomlm.data.tokenizer import Tokenizer
        from bloomlm.export.program import export_program

        tokenizer = Tokenizer.from_directory(resolve_source("builtin:tiny").directory)
        model = load_model(str(model_directory(args)))
        in_bf16 = precision == "bf16"
        export_program(
            model,
            tokenizer,
            path,
            source=args.size,
            format=form,
            quantization="none" if in_bf16 else precision,
            dtype=torch.bfloat16 if in_bf16 else None,
            verify=False,  # its error is measured here
        )
    return path


def open_side(args: argparse.Namespace) -> Side:
    """A side, ready to be measured."""
    kind = args.side.partition("-")[0]
    if args.side in OURS:
        return Stepping(Ours(our_model(args)))
    if kind == "ctranslate2":
        return peers.CTranslate2(made(args) / args.side, args.threads)
    if kind == "openvino":
        return Stepping(peers.OpenVino(made(args) / args.side / "openvino_model.xml", args.threads))
    if kind == "llama.cpp":
        return Stepping(peers.LlamaCpp(program(args).with_suffix(".gguf"), args.threads))
    if kind == "onnxruntime":
        return Stepping(peers.OnnxRuntime(program(args).with_suffix(".onnx"), args.threads))
    return Stepping(peers.Transformers(model_directory(args)))


class Ours:
    """A model of bloomlm with the calls that the peers have."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prefill(self, prompts: list[list[int]], max_new_tokens: int) -> tuple["Ours", Any]:
        self._rows = self._model.open_rows(len(prompts), max(map(len, prompts)) + max_new_tokens)
        return self, self._rows.prefill(range(len(prompts)), prompts)

    def decode_step(self, tokens: Any) -> Any:
        return self._rows.decode_step(range(len(tokens)), tokens)


def our_model(args: argparse.Namespace) -> Any:
    """A model of bloomlm, or a program of one."""
    import torch

    from bloomlm.allocator import keep_freed_memory

    keep_freed_memory()  # as every command does
    kind, _, precision = args.side.partition("-")
    if kind == "eager":
        from bloomlm.checkpoint.reader import load_model

        return load_model(str(model_directory(args)), dtype=torch.bfloat16 if precision else None)
    from bloomlm.runtime import Program

    return Program(program(args)).model


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One side."""
    started = time.perf_counter()
    import torch

    torch.set_num_threads(args.threads)
    random = np.random.default_rng(0)
    result: dict[str, float] = {}
    with torch.inference_mode():
        side = open_side(args)
        side.read(some_prompts(random, 1, 8))
        result["first_token_seconds"] = time.perf_counter() - started
        for rows in (1, 8):
            seconds = side.step_seconds(some_prompts(random, rows, PROMPT_TOKENS), args.new_tokens)
            result[f"decode_{rows}"] = rows / seconds
        prompt = some_prompts(random, 1, LONG_TOKENS)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            side.read(prompt)
            times.append(time.perf_counter() - start)
        result["prefill_512"] = LONG_TOKENS / statistics.median(times)
        result["peak_memory_gb"] = peak_memory_bytes() / 1e9
        expected = np.load(reference_path(args))
        result["error"] = float(np.linalg.norm(side.logits(*given_tokens()) - expected) / np.linalg.norm(expected))
    result["read_gb_per_second"] = read_speed()
    used = result["decode_1"] * weight_bytes(args) / 1e9
    result["bandwidth"] = used / result["read_gb_per_second"]
    return result


def some_prompts(random: np.random.Generator, rows: int, length: int) -> list[list[int]]:
    return random.integers(4, 250_000, (rows, length)).tolist()


def given_tokens() -> tuple[list[int], list[int]]:
    """The prompt and the further tokens that errors are measured after."""
    tokens = some_prompts(np.random.default_rng(1), 1, PROMPT_TOKENS + FORCED_TOKENS)[0]
    return tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:]


def reference_path(args: argparse.Namespace) -> Path:
    return made(args) / "logits.npy"


def weight_bytes(args: argparse.Namespace) -> float:
    """Bytes of the weights that a token needs: all of them, the embedding as the head."""
    from safetensors import safe_open

    per_weight = BYTES_PER_WEIGHT.get(args.side.partition("-")[2], 4.0)
    total = 0.0
    for path in model_directory(args).glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        total += sum(math.prod(shape) * (per_weight if len(shape) == 2 else 4) for shape in shapes)
    return total


def read_speed() -> float:
    """GB/s of a sum over 1 GB, the best of five."""
    import torch

    data = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.numel() * 4 / min(times) / 1e9


def print_tables(results: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over the rounds, and ratios of ours over each peer."""
    medians = {side: {key: median(found, key) for key in KEYS} for side, found in results.items()}
    print_row(["", *KEYS])
    print_row(["---"] * (1 + len(KEYS)))
    for side, found in medians.items():
        print_row([side, *(f"{found[key]:.1e}" if key == "error" else f"{found[key]:.2f}" for key in KEYS)])
    ours = [side for side in medians if side in OURS]
    print()
    print_row(["ours / peer: " + ", ".join(RATES), *ours])
    print_row(["---"] * (1 + len(ours)))
    for peer in (side for side in medians if side not in OURS):
        ratios = [[medians[side][key] / medians[peer][key] for key in RATES] for side in ours]
        print_row([peer, *(", ".join(f"{ratio:.2f}" for ratio in row) for row in ratios)])


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--sides", default=SIDES)
    parser.add_argument("--size", default="560m")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.side:
        print("\n" + json.dumps(prepared(args) if args.prepare else measure(args)))
        return
    shared = [f"--{name}={getattr(args, name)}" for name in ("size", "layers", "threads", "new_tokens")]
    run_side(__file__, "transformers", ["--prepare", *shared], args.threads)  # the logits that all are compared with
    sides = []
    for side in args.sides.split(","):
        missing = run_side(__file__, side, ["--prepare", *shared], args.threads)["missing"]
        if missing:
            print(f"left out: {side} ({missing})", file=sys.stderr, flush=True)
        else:
            sides.append(side)
    results = alternate(__file__, sides, args.rounds, shared, args.threads)
    print(f"bloom-{args.size} shape, {args.threads} threads, prompts of {PROMPT_TOKENS}; {machine()}\n")
    print_tables(results)
    record(results)


def prepared(args: argparse.Namespace) -> dict[str, str]:
    """Prepare a side, or tell which packages it misses."""
    missing = peers.missing_packages(args.side.partition("-")[0])
    if not missing:
        prepare(args)
    return {"missing": ", ".join(missing)}


if __name__ == "__main__":
    main()
