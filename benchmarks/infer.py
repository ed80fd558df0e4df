"""Exported programs on a random model of bloom-560m's shape, beside the model itself and other runtimes.

    python benchmarks/infer.py --sides transformers,pt2,pt2-int8,llama.cpp-Q8_0

Each side runs in a process of its own, and the sides take turns: decoding one and eight sequences after prompts of 128
tokens, and reading a prompt of 512. Prints tokens per second, peak memory, time to the first token, and the speed at
which this machine reads memory. Programs are exported on first use, beside the random model, which takes minutes each.

Sides: transformers, eager (bloomlm's model), pt2, pt2-int8, pt2-int4, onnx, openvino; llama.cpp-F32, -Q8_0 and -Q4_0
(with the extras gguf and llama_cpp).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import alternate, machine, median, peak_memory_bytes, random_model

PROMPT_TOKENS = 128
LONG_TOKENS = 512
KEYS = ("decode_1", "decode_8", "prefill_512", "first_token_seconds", "peak_memory_gb", "read_gb_per_second")


def program_path(size: str, side: str) -> Path:
    """A program of the random model, exported on first use."""
    kind, _, quantization = side.partition("-")
    quantization = {"Q8_0": "int8", "Q4_0": "int4", "F32": "none"}.get(quantization, quantization or "none")
    form = "gguf" if kind == "llama.cpp" else kind
    path = random_model(size).parent / f"programs-{size}" / f"{form}-{quantization}"
    if not path.with_name(f"{path.name}.json").exists():
        from bloomlm.checkpoint.reader import load_model
        from bloomlm.checkpoint.source import resolve_source
        from bloomlm.data.tokenizer import Tokenizer
        from bloomlm.export.program import export_program

        tokenizer = Tokenizer.from_directory(resolve_source("builtin:tiny").directory)
        model = load_model(str(random_model(size)))
        # a random model has no perplexity to keep
        export_program(
            model, tokenizer, path, source=size, format=form, quantization=quantization, verify=quantization == "none"
        )
    return path


def language_model(side: str, size: str) -> Any:
    """What the decoding loop takes."""
    if side == "eager":
        from bloomlm.checkpoint.reader import load_model
        from bloomlm.generation.decode import BloomLanguageModel

        return BloomLanguageModel(load_model(str(random_model(size))))
    if side == "transformers":
        return Transformers(size)
    from bloomlm.runtime import Program

    return Program(program_path(size, side)).model


class Transformers:
    """transformers' forward pass, with its own cache."""

    def __init__(self, size: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(random_model(size), dtype=torch.float32).eval()
        self._cache: Any = None

    def prefill(self, prompts: list[list[int]], max_new_tokens: int) -> tuple["Transformers", Any]:
        out = self._model(self._torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return self, out.logits[:, -1]

    def decode_step(self, tokens: Any) -> Any:
        out = self._model(tokens[:, None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One side that the decoding loop can drive."""
    started = time.perf_counter()
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    model = language_model(args.side, args.size)
    random = np.random.default_rng(0)
    result: dict[str, float] = {}
    with torch.inference_mode():
        model.prefill(random.integers(4, 250_000, (1, 8)).tolist(), 1)
        result["first_token_seconds"] = time.perf_counter() - started
        for rows in (1, 8):
            batch, logits = model.prefill(
                random.integers(4, 250_000, (rows, PROMPT_TOKENS)).tolist(), args.new_tokens + 1
            )
            steps = []
            for _ in range(args.new_tokens):
                start = time.perf_counter()
                logits = batch.decode_step(logits.argmax(dim=-1))
                steps.append(time.perf_counter() - start)
            result[f"decode_{rows}"] = rows / statistics.median(steps)
        prompt = random.integers(4, 250_000, (1, LONG_TOKENS)).tolist()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model.prefill(prompt, 1)
            times.append(time.perf_counter() - start)
        result["prefill_512"] = LONG_TOKENS / statistics.median(times)
    result["peak_memory_gb"] = peak_memory_bytes() / 1e9
    result["read_gb_per_second"] = read_speed()
    return result


def read_speed() -> float:
    """GB/s of a sum over 1 GB."""
    import torch

    data = torch.ones(1 << 28)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.numel() * 4 / min(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side")
    parser.add_argument("--sides", default="transformers,eager,pt2,pt2-int8")
    parser.add_argument("--size", default="560m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    if args.side:
        print("\n" + json.dumps(measure(args)))
        return
    sides = args.sides.split(",")
    for side in sides:
        if side not in ("transformers", "eager"):
            program_path(args.size, side)
    shared = ["--size", args.size, "--threads", str(args.threads), "--new_tokens", str(args.new_tokens)]
    results = alternate(__file__, sides, args.rounds, shared, args.threads)
    print(f"bloom-{args.size} shape, {args.threads} threads, prompts of {PROMPT_TOKENS}; {machine()}")
    print(f"{'':18}" + "".join(f"{key:>21}" for key in KEYS))
    for side in sides:
        found = [median(results[side], key) if key in results[side][0] else float("nan") for key in KEYS]
        print(f"{side:18}" + "".join(f"{value:21.2f}" for value in found))


if __name__ == "__main__":
    main()
