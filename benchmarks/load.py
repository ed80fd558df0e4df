"""Time to a loaded fp32 model of bloom-560m's shape: bloomlm beside transformers, files in the page cache.

    python benchmarks/load.py

Each measurement is a fresh process: imports, then loading, then one forward pass of 8 tokens (so that memory-mapped
weights have been touched). Prints seconds of each part, peak memory and the ratios.
"""

import argparse
import json
import time

from common import alternate, machine, median, peak_memory_bytes, random_model, record, side_parser


def run(args: argparse.Namespace) -> dict:
    """One side."""
    directory = random_model(args.size)
    start = time.perf_counter()
    import torch

    if args.side == "bloomlm":
        from bloomlm.checkpoint.reader import load_model

        imported = time.perf_counter()
        model = load_model(str(directory))
    else:
        from transformers import BloomForCausalLM

        imported = time.perf_counter()
        model = BloomForCausalLM.from_pretrained(directory, dtype=torch.float32)
    loaded = time.perf_counter()
    with torch.inference_mode():
        model(torch.arange(8)[None])
    used = time.perf_counter()
    return {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "first_use_seconds": used - loaded,
        "total_seconds": used - start,
        "peak_memory_gb": peak_memory_bytes() / 1e9,
    }


def main() -> None:
    parser = side_parser(__doc__, ("bloomlm", "transformers"), rounds=5)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    random_model(args.size)
    results = alternate(__file__, ("transformers", "bloomlm"), args.rounds, ["--size", args.size])
    print(f"loading, bloom-{args.size} shape, fp32, page cache warm; {machine()}")
    print(f"{'':20}{'transformers':>14}{'bloomlm':>10}{'ratio':>8}")
    for key in results["bloomlm"][0]:
        theirs, ours = (median(results[side], key) for side in ("transformers", "bloomlm"))
        print(f"{key:20}{theirs:14.2f}{ours:10.2f}{ours / theirs:8.2f}")
    record(results)


if __name__ == "__main__":
    main()
