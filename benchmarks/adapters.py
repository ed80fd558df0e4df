"""Rows with different adapters in one batch beside the same model without adapters: generating and reading prompts.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --threads 1 --processor_time

A random model of 8 blocks of width 1,024 continues 8 rows behind prompts of 64 tokens, with 1, 4 and 8 adapters of rank
8 on query_key_value and on all linear layers. All cases take turns within one process, step by step, and each is given
relative to the plain model. --processor_time counts the processor's time, on machines that do other work too; it
needs --threads 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import machine, record

from bloomlm.adapters.bank import AdapterBank
from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

NUM_ROWS, PROMPT_TOKENS = 8, 64
MIXES: dict[str, list[str | None]] = {
    "no adapter": [None] * NUM_ROWS,
    "1 adapter in one row": ["0", *[None] * (NUM_ROWS - 1)],
    **{f"{count} adapters": [str(row % count) for row in range(NUM_ROWS)] for count in (1, 4, 8)},
}


def with_adapters(plain: BloomForCausalLM, kind: type[LoraConfig], targets: tuple[str, ...]) -> BloomForCausalLM:
    """A model with the same weights and 8 adapters."""
    model = BloomForCausalLM(plain.config).eval()
    model.load_state_dict(plain.state_dict(), assign=True)
    bank = AdapterBank(model)
    for number in range(NUM_ROWS):
        adapted = bank.base_model()
        apply_adapter(adapted, kind(r=8, target_modules=targets), torch.Generator().manual_seed(number))
        bank.load(str(number), adapted)
    return model


@torch.inference_mode()
def measure(
    plain: BloomForCausalLM, model: BloomForCausalLM, clock: Callable[[], float], steps: int
) -> dict[str, dict[str, float]]:
    """Print and return the median time of each case over that of the plain model."""
    ids = torch.randint(0, plain.config.vocab_size, (NUM_ROWS, PROMPT_TOKENS)).tolist()
    sides = {"plain": plain.open_rows(NUM_ROWS, PROMPT_TOKENS + steps)}
    sides |= {mix: model.open_rows(NUM_ROWS, PROMPT_TOKENS + steps) for mix in MIXES}
    reading: dict[str, list[float]] = {side: [] for side in sides}
    generating: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(5):
        for side, rows in sides.items():
            for row in range(NUM_ROWS):
                rows.free(row)
                if side in MIXES:
                    rows.set_adapter(row, MIXES[side][row])
            start = clock()
            rows.prefill(range(NUM_ROWS), ids)
            reading[side].append(clock() - start)
    for _ in range(steps):
        for side, rows in sides.items():
            start = clock()
            rows.decode_step(range(NUM_ROWS), torch.arange(NUM_ROWS))
            generating[side].append(clock() - start)
    found: dict[str, dict[str, float]] = {side: {} for side in MIXES}
    for what, times in (("reading", reading), ("generating", generating)):
        base = statistics.median(times["plain"])
        for side in MIXES:
            found[side][what] = statistics.median(times[side]) / base
        ratios = [f"{side} {found[side][what]:.3f}" for side in MIXES]
        print(f"  {what}, plain {1000 * base:.1f} ms; {', '.join(ratios)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processor_time", action="store_true")
    args = parser.parse_args()
    if args.processor_time and args.threads != 1:
        parser.error("--processor_time adds up the time of all threads; give --threads 1 too")
    torch.set_num_threads(args.threads)
    print(machine())
    plain = BloomForCausalLM(BloomConfig(vocab_size=1000, hidden_size=1024, n_layer=8, n_head=16)).eval()
    plain.init_weights(torch.Generator().manual_seed(0))
    rows: dict[str, list[dict[str, float]]] = {}
    for kind in (LoraConfig, DoraConfig):
        for where, targets in (("query_key_value", ("query_key_value",)), ("all layers", BLOCK_LINEARS)):
            print(f"{kind.kind} on {', '.join(targets)}")
            found = measure(
                plain,
                with_adapters(plain, kind, targets),
                time.process_time if args.processor_time else time.perf_counter,
                args.steps,
            )
            rows |= {f"{kind.kind} on {where}, {mix}": [row] for mix, row in found.items()}
    record(rows)


if __name__ == "__main__":
    main()
