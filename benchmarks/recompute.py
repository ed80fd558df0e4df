"""What --recompute costs and saves: forward and backward with every activation kept, and with each block's made again.

    python benchmarks/recompute.py

bloom-560m's shape, fp32, batches of 4 and 16 documents of 256 tokens with 50 labels each; no optimizer, whose memory is
the same either way. Prints seconds, the memory a step takes beyond the weights, and the losses, which must be equal.
"""

import argparse
import json
import statistics
import time

from common import alternate, machine, median, memory_bytes, peak_memory_bytes, random_model, record, side_parser

DOCUMENT_TOKENS = 256
LABELS = 50


def run(args: argparse.Namespace) -> dict:
    """One side of one row: a step to warm up, then args.steps."""
    import torch

    from bloomlm.adapters.base import FullTuning, apply_adapter
    from bloomlm.adapters.lora import LoraConfig
    from bloomlm.allocator import keep_freed_memory
    from bloomlm.checkpoint.reader import load_model
    from bloomlm.model.documents import Documents
    from bloomlm.parallel.tensor_parallel import head_of
    from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
    from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

    keep_freed_memory()  # as every command does
    model = load_model(random_model(args.size), memory_map=False).train()
    apply_adapter(model, FullTuning() if args.tuning == "full" else LoraConfig(r=8), torch.Generator().manual_seed(0))
    model.transformer.recompute = args.side == "made again"
    num_tokens = args.documents * DOCUMENT_TOKENS
    tokens = torch.randint(4, model.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1).view(args.documents, -1)
    labels[:, :-LABELS] = IGNORE_INDEX
    seconds = []
    before = memory_bytes()
    for _ in range(1 + args.steps):
        start = time.perf_counter()
        hidden = model.transformer(tokens, Documents.equal(args.documents, DOCUMENT_TOKENS))
        loss = linear_cross_entropy(hidden, head_of(model), labels.flatten(), scale=1 / (args.documents * LABELS))
        loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "memory_gb": (peak_memory_bytes() - before) / 1e9,
        "loss": loss.item(),
    }


def main() -> None:
    parser = side_parser(__doc__, ("kept", "made again"), rounds=1)
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    random_model(args.size)
    print(f"bloom-{args.size} shape, fp32, 2 threads; {machine()}")
    table = {}
    for tuning in ("full", "lora"):
        for documents in (4, 16):
            arguments = ["--size", args.size, "--tuning", tuning, "--documents", str(documents)]
            arguments += ["--steps", str(args.steps)]
            results = alternate(__file__, ("kept", "made again"), args.rounds, arguments)
            point = f"{tuning}, {documents * DOCUMENT_TOKENS:,} tokens"
            table |= {f"{point}, {side}": rounds for side, rounds in results.items()}
            row = f"{point}:"
            for side, rounds in results.items():
                seconds, memory = median(rounds, "seconds"), median(rounds, "memory_gb")
                row += f"  {side} {seconds:.2f} s {memory:.2f} GB loss {rounds[0]['loss']:.6f}"
            print(row, flush=True)
    record(table)


if __name__ == "__main__":
    main()
