"""Greedy generation on a random model of bloom-560m's shape: bloomlm beside transformers' generate.

    python benchmarks/decode.py
    python benchmarks/decode.py --device cuda --dtype bfloat16 --new_tokens 128

Prompts of 128 tokens, 1 and 8 at a time; prefill and decode are timed apart (decode: time for N + 1 new tokens minus
time for 1). Prints tokens per second of both sides, whether the ids are equal, peak memory and the ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from common import alternate, machine, median, peak_memory_bytes, random_model, record, side_parser

PROMPT_TOKENS = 128


def bloomlm_generate(args: argparse.Namespace) -> Callable[[list[list[int]], int], list[list[int]]]:
    import torch

    from bloomlm.checkpoint.reader import load_model
    from bloomlm.generation.config import GenerationConfig
    from bloomlm.generation.generate import generate

    model = load_model(str(random_model(args.size)), device=args.device, dtype=getattr(torch, args.dtype))

    def run(prompts: list[list[int]], num_new: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=num_new, min_new_tokens=num_new)
        return [list(result.tokens) for result in generate(model, prompts, config)]

    return run


def transformers_generate(args: argparse.Namespace) -> Callable[[list[list[int]], int], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_model(args.size), dtype=getattr(torch, args.dtype)).eval()
    model.to(args.device)

    def run(prompts: list[list[int]], num_new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=args.device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                pad_token_id=3,
            )
        return out[:, ids.shape[1] :].tolist()

    return run


def run(args: argparse.Namespace) -> dict:
    """One side."""
    generate = {"bloomlm": bloomlm_generate, "transformers": transformers_generate}[args.side](args)
    random = np.random.default_rng(0)
    result: dict = {}
    for batch_size in (1, 8):
        prompts = random.integers(4, 250_000, (batch_size, PROMPT_TOKENS)).tolist()
        generate(prompts, 2)
        prefill, decode = [], []
        for _ in range(args.repeats):
            start = time.perf_counter()
            generate(prompts, 1)
            first = time.perf_counter()
            ids = generate(prompts, args.new_tokens + 1)
            decode.append(time.perf_counter() - first - (first - start))
            prefill.append(first - start)
        result[f"prefill_{batch_size}"] = batch_size * PROMPT_TOKENS / statistics.median(prefill)
        result[f"decode_{batch_size}"] = batch_size * args.new_tokens / statistics.median(decode)
        result[f"ids_{batch_size}"] = ids
    result["peak_memory_gb"] = peak_memory_bytes(args.device) / 1e9
    return result


def main() -> None:
    parser = side_parser(__doc__, ("bloomlm", "transformers"), rounds=3)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    random_model(args.size)
    arguments = ["--size", args.size, "--new_tokens", str(args.new_tokens), "--repeats", str(args.repeats)]
    arguments += ["--device", args.device, "--dtype", args.dtype]
    results = alternate(__file__, ("transformers", "bloomlm"), args.rounds, arguments)
    print(
        f"greedy generation, bloom-{args.size} shape, {args.dtype}, prompts of {PROMPT_TOKENS}; {machine(args.device)}"
    )
    print(f"{'':18}{'transformers':>14}{'bloomlm':>10}{'ratio':>8}")
    for key in ("prefill_1", "decode_1", "prefill_8", "decode_8", "peak_memory_gb"):
        theirs, ours = (median(results[side], key) for side in ("transformers", "bloomlm"))
        print(f"{key:18}{theirs:14.2f}{ours:10.2f}{ours / theirs:8.2f}")
    for key in ("ids_1", "ids_8"):
        equal = results["bloomlm"][0][key] == results["transformers"][0][key]
        print(f"{key}: {'equal' if equal else 'DIFFERENT'} token for token")
    record(results)


if __name__ == "__main__":
    main()
