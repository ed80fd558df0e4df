"""DPO and SFT of a LoRA adapter on a random model of bloom-560m's shape: bloomlm beside TRL, same examples.

    python benchmarks/preference.py --objective dpo
    python benchmarks/preference.py --objective sft

Needs trl beside bloomlm. A step takes 2 prompts (100-300 tokens) with a chosen and a rejected answer (20-200 tokens),
or with SFT the chosen one alone, drawn once; fp32, the same fused AdamW. TRL gets each batch from its own collator and
pads, as its packing lets examples of BLOOM see each other. Its reference is its default, a pass without the adapter in
every step; bloomlm's is computed before the first step, and its time is divided among the steps as over one epoch.
Prints tokens per second (real tokens; pads do not count) with and without the reference, peak memory, losses, ratios.
"""

import argparse
import json
import statistics
import tempfile
import time

import numpy as np
from common import alternate, machine, median, peak_memory_bytes, random_model, record, side_parser

LEARNING_RATE = 1e-4
LORA_RANK = 8
BETA = 0.1


def draw_rows(count: int) -> list[dict[str, list[int]]]:
    """Token ids of prompts and answers; the same on both sides."""
    random = np.random.default_rng(0)
    ranges = {"prompt_ids": (100, 301), "chosen_ids": (20, 201), "rejected_ids": (20, 201)}
    return [
        {name: random.integers(4, 250_000, int(random.integers(*bounds))).tolist() for name, bounds in ranges.items()}
        for _ in range(count)
    ]


def num_tokens(row: dict[str, list[int]], objective: str) -> int:
    """Real tokens of a row: its prompt belongs to each answer."""
    answers = ("chosen_ids", "rejected_ids") if objective == "dpo" else ("chosen_ids",)
    return sum(len(row["prompt_ids"]) + len(row[name]) for name in answers)


def bloomlm_steps(args: argparse.Namespace, rows: list[dict[str, list[int]]]):
    """Yield each step's loss, after the seconds of the reference for a step."""
    import torch

    from bloomlm.adapters.base import apply_adapter
    from bloomlm.adapters.lora import LoraConfig
    from bloomlm.allocator import keep_freed_memory
    from bloomlm.checkpoint.reader import load_model
    from bloomlm.data.answer_batch import ComparedExample, collate_answers
    from bloomlm.data.example import Example
    from bloomlm.data.loader import BatchLoader
    from bloomlm.training.objectives.cross_entropy import CrossEntropy
    from bloomlm.training.objectives.dpo import Dpo
    from bloomlm.training.objectives.preference import score_answers
    from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
    from bloomlm.training.precision import Precision
    from bloomlm.training.step import StepConfig, Trainer

    keep_freed_memory()  # as every command does
    model = load_model(str(random_model(args.size)))

    def answer(row: dict[str, list[int]], name: str) -> Example:
        return Example.pair(np.array(row["prompt_ids"] + row[name], dtype=np.int32), len(row["prompt_ids"]))

    examples: list[Example] = [answer(row, "chosen_ids") for row in rows]
    start = time.perf_counter()
    if args.objective == "dpo":
        pairs = [(answer(row, "chosen_ids"), answer(row, "rejected_ids")) for row in rows]
        with torch.no_grad():
            scores = [score_answers(model, collate_answers(pair), Precision()).answers.tolist() for pair in pairs]
        examples = [
            ComparedExample(**vars(chosen), other=rejected, is_desirable=True, reference=tuple(score))
            for (chosen, rejected), score in zip(pairs, scores, strict=True)
        ]
    yield (time.perf_counter() - start) / (len(rows) / args.batch_size)
    apply_adapter(model, LoraConfig(r=LORA_RANK), torch.Generator().manual_seed(0))
    objective = Dpo(beta=BETA) if args.objective == "dpo" else CrossEntropy()
    trainer = Trainer(
        model,
        BatchLoader(examples, args.batch_size, shuffle=False, collate=objective.collate),
        optimizer=AdamWConfig(),
        schedule=ScheduleConfig(learning_rate=LEARNING_RATE, lr_scheduler_type="constant").over(len(rows)),
        precision=Precision(),
        config=StepConfig(max_grad_norm=0.0),
        objective=objective,
    )
    while True:
        yield trainer.run_step().loss


def trl_steps(args: argparse.Namespace, rows: list[dict[str, list[int]]]):
    """The same with TRL's loss on the batches of its own collator."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from bloomlm.checkpoint.source import resolve_source

    model = AutoModelForCausalLM.from_pretrained(random_model(args.size), dtype=torch.float32)
    common = {
        "args": {
            "output_dir": tempfile.mkdtemp(),
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": None,
        },
        "processing_class": AutoTokenizer.from_pretrained(resolve_source("builtin:tiny").directory),
        "peft_config": LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["query_key_value"], task_type="CAUSAL_LM"
        ),
    }
    options = common.pop("args")
    if args.objective == "dpo":
        dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(model, args=DPOConfig(**options, beta=BETA), train_dataset=dataset, **common)
    else:
        dataset = Dataset.from_list([{"prompt": "a", "completion": "b"}])
        trainer = SFTTrainer(model, args=SFTConfig(**options, packing=False), train_dataset=dataset, **common)
        rows = [
            {
                "input_ids": row["prompt_ids"] + row["chosen_ids"],
                "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
            }
            for row in rows
        ]
    model = trainer.model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    yield 0.0  # seconds of a reference before the first step
    for first in range(0, len(rows), args.batch_size):
        loss = trainer.compute_loss(model, trainer.data_collator(rows[first : first + args.batch_size]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def run(args: argparse.Namespace) -> dict:
    """One side; the first step warms up."""
    rows = draw_rows((args.steps + 1) * args.batch_size)
    steps = {"bloomlm": bloomlm_steps, "trl": trl_steps}[args.side](args, rows)
    reference_seconds = next(steps)
    losses, seconds = [next(steps)], []
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(next(steps))
        seconds.append(time.perf_counter() - start)
    tokens = [
        sum(num_tokens(row, args.objective) for row in rows[first : first + args.batch_size])
        for first in range(args.batch_size, len(rows), args.batch_size)
    ]
    return {
        "tokens_per_second": statistics.median(
            n / (s + reference_seconds) for n, s in zip(tokens, seconds, strict=True)
        ),
        "later_tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "peak_memory_gb": peak_memory_bytes() / 1e9,
        "losses": losses,
    }


def main() -> None:
    parser = side_parser(__doc__, ("bloomlm", "trl"), rounds=1)
    parser.add_argument("--objective", choices=("dpo", "sft"), default="dpo")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=2)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    random_model(args.size)
    arguments = ["--objective", args.objective, "--size", args.size, "--steps", str(args.steps)]
    arguments += ["--batch_size", str(args.batch_size)]
    results = alternate(__file__, ("trl", "bloomlm"), args.rounds, arguments)
    print(f"{args.objective} with LoRA, bloom-{args.size} shape, fp32; {machine()}")
    print(f"{'':10}{'tokens/s':>10}{'later epochs':>14}{'peak GB':>10}  losses")
    keys = "tokens_per_second", "later_tokens_per_second", "peak_memory_gb"
    for side, rounds in results.items():
        speed, later, memory = (median(rounds, key) for key in keys)
        losses = " ".join(f"{loss:.5f}" for loss in rounds[0]["losses"])
        print(f"{side:10}{speed:10.1f}{later:14.1f}{memory:10.2f}  {losses}")
    for key, name in zip(keys, ("speed", "speed in later epochs", "memory"), strict=True):
        print(f"{name} ratio: {median(results['bloomlm'], key) / median(results['trl'], key):.2f}")
    record(results)


if __name__ == "__main__":
    main()
