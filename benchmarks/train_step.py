"""Training steps on a random model of bloom-560m's shape: bloomlm beside transformers (+ PEFT), same examples.

    python benchmarks/train_step.py --tuning full
    python benchmarks/train_step.py --tuning full --max_grad_norm 1
    python benchmarks/train_step.py --tuning lora
    python benchmarks/train_step.py --tuning prefix
    python benchmarks/train_step.py --tuning lora --base_quantization nf4
    python benchmarks/train_step.py --tuning lora --sides bloomlm bloomlm-O1 bloomlm-O2 transformers-O1
    python benchmarks/train_step.py --tuning full --sides bloomlm-O1 --profile
    python benchmarks/train_step.py --sides bloomlm-O1 transformers-O1 --device cuda --batch_size 16 --warm_up 5

Every step takes one batch of 2 examples (100-500 source and 20-100 target tokens, drawn once), the same fused AdamW,
labels on the target only. A side computes in fp32, or in bf16 where its name ends in -O1 (fp32 weights, autocast) or
-O2 (bf16 weights, in bloomlm with fp32 masters). Prints tokens per second (real tokens; pads do not count), peak
memory, their ratios to the first side, the losses, and what part of the machine's fp32 peak each side reaches: the
arithmetic that training needs (not what is computed beside it) by time, against large products by the faster of torch's
libraries in the same process. With --base_quantization transformers has its own way to the same: LLM.int8 or QLoRA of
bitsandbytes.
"""

import argparse
import json
import statistics
import time

import numpy as np
from common import alternate, autocast, machine, median, peak_memory_bytes, random_model, record

LEARNING_RATE = 1e-4
LORA_RANK = 8
NUM_PREFIX_TOKENS = 16
SIDES = tuple(name + precision for name in ("transformers", "bloomlm") for precision in ("", "-O1", "-O2"))


def draw_batches(num_batches: int, batch_size: int) -> list[list[tuple[np.ndarray, int]]]:
    """(tokens, number of source tokens) of every example; the same on both sides."""
    random = np.random.default_rng(0)
    batches = []
    for _ in range(num_batches):
        batch = []
        for _ in range(batch_size):
            num_source, num_target = int(random.integers(100, 501)), int(random.integers(20, 101))
            batch.append((random.integers(4, 250_000, num_source + num_target), num_source))
        batches.append(batch)
    return batches


def bloomlm_steps(args: argparse.Namespace, batches: list):
    """Yield each step's loss and the operations that it needs, one optimizer update each."""
    import torch

    from bloomlm.adapters.base import FullTuning, apply_adapter
    from bloomlm.adapters.lora import LoraConfig
    from bloomlm.adapters.prefix import PrefixConfig
    from bloomlm.allocator import keep_freed_memory
    from bloomlm.checkpoint.reader import load_model
    from bloomlm.data.example import Example
    from bloomlm.data.loader import BatchLoader
    from bloomlm.kernels.compiled import load_operators
    from bloomlm.model.quantized import QUANTIZATIONS
    from bloomlm.training.meter import BatchMeter, StepFlops
    from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
    from bloomlm.training.precision import Precision
    from bloomlm.training.step import StepConfig, Trainer

    keep_freed_memory()  # as every command does
    load_operators()  # as fine-tuning does
    quantization = QUANTIZATIONS.get(args.base_quantization)
    is_half = args.bf16 or args.half_weights
    precision = Precision(compute_dtype=torch.bfloat16 if is_half else torch.float32, half_weights=args.half_weights)
    model = load_model(
        str(random_model(args.size)),
        dtype=precision.weights_dtype,
        device=args.device,
        memory_map=False,
        quantization=quantization,
        linear_dtype=precision.linear_dtype(args.device, learns=args.tuning == "full"),
    )
    adapters = {
        "full": FullTuning(),
        "lora": LoraConfig(r=LORA_RANK),
        "prefix": PrefixConfig(num_prefix_tokens=NUM_PREFIX_TOKENS),
    }
    apply_adapter(model, adapters[args.tuning], torch.Generator(args.device).manual_seed(0))
    if args.tuning == "prefix":
        with torch.no_grad():
            model.transformer.prefix.embedding.weight.copy_(prefix_values(model.config))
    examples = [Example.pair(tokens.astype(np.int32), num_source) for batch in batches for tokens, num_source in batch]
    loader = BatchMeter(BatchLoader(examples, args.batch_size, shuffle=False, seed=0), StepFlops(model))
    trainer = Trainer(
        model,
        loader,
        optimizer=AdamWConfig(),
        schedule=ScheduleConfig(learning_rate=LEARNING_RATE, lr_scheduler_type="constant").over(len(batches)),
        precision=precision,
        config=StepConfig(
            max_grad_norm=args.max_grad_norm, fuses_update=args.tuning == "full" and args.max_grad_norm == 0
        ),
    )
    for _ in batches:
        before = loader.num_flops
        loss = trainer.run_step().loss
        yield loss, loader.num_flops - before


def prefix_values(config):
    """Where both sides' prefixes start, in PEFT's layout."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_PREFIX_TOKENS, 2 * config.n_layer * config.hidden_size, generator=generator)


def transformers_steps(args: argparse.Namespace, batches: list):
    """The same with transformers' model and its own loss, padded to the longest example of the batch."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    }[args.base_quantization]
    model = AutoModelForCausalLM.from_pretrained(
        random_model(args.size),
        dtype=torch.bfloat16 if args.half_weights else torch.float32,
        quantization_config=quantization,
    )
    if quantization is not None:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if args.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["query_key_value"])
        model = get_peft_model(model, lora)
    if args.tuning == "prefix":
        from peft import PrefixTuningConfig, get_peft_model

        config = model.config
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_PREFIX_TOKENS))
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(prefix_values(config))
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    for batch in batches:
        longest = max(len(example) for example, _ in batch)
        ids = torch.full((len(batch), longest), 3)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, (example, num_source) in enumerate(batch):
            ids[row, : len(example)] = torch.from_numpy(example)
            labels[row, num_source : len(example)] = ids[row, num_source : len(example)]
            mask[row, : len(example)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        with autocast(args):
            loss = model(**{name: tensor.to(args.device) for name, tensor in inputs.items()}).loss
        loss.backward()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), 0


def choose_precision(args: argparse.Namespace, side: str) -> str:
    """Set the precision that a side's name ends in; returns the name without it."""
    name, _, level = side.partition("-")
    args.bf16, args.half_weights = level == "O1", level == "O2"
    return name


def run(args: argparse.Namespace) -> dict:
    """One side: the first batches warm up, every other batch counts its tokens once."""
    steps = {"bloomlm": bloomlm_steps, "transformers": transformers_steps}[choose_precision(args, args.side)]
    batches = draw_batches(args.steps + args.warm_up, args.batch_size)
    peak = peak_flops(args)
    iterator = steps(args, batches)
    losses, seconds, flops = [next(iterator)[0] for _ in range(args.warm_up)], [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        loss, needed = next(iterator)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        flops.append(needed)
    tokens = [sum(len(example) for example, _ in batch) for batch in batches[args.warm_up :]]
    return {
        "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "peak_memory_gb": peak_memory_bytes(args.device) / 1e9,
        "tflop_a_token": statistics.median(n / t for n, t in zip(flops, tokens, strict=True)) / 1e12,
        "peak_gflops": peak / 1e9,
        "losses": losses,
    }


def print_profile(args: argparse.Namespace) -> None:
    """The operations that take most of bloomlm's steps."""
    from torch.profiler import ProfilerActivity, profile

    choose_precision(args, args.sides[0])
    iterator = bloomlm_steps(args, draw_batches(args.steps + args.warm_up, args.batch_size))
    for _ in range(args.warm_up):
        next(iterator)
    on_gpu = args.device != "cpu"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(args.steps):
            next(iterator)
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=80))


def peak_flops(args: argparse.Namespace) -> float:
    """Of large products, on a CPU in fp32 by the faster of torch's libraries."""
    import torch

    from bloomlm.training.meter import measure_peak_flops

    if args.device != "cpu":
        dtype = torch.bfloat16 if args.bf16 or args.half_weights else torch.float32
        return measure_peak_flops(torch.device(args.device), dtype, size=8192)
    found = [measure_peak_flops(torch.device("cpu"), torch.float32)]
    with torch.backends.mkldnn.flags(enabled=False):
        found.append(measure_peak_flops(torch.device("cpu"), torch.float32))
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=("transformers", "bloomlm"))
    parser.add_argument("--tuning", choices=("full", "lora", "prefix"), default="full")
    parser.add_argument("--base_quantization", choices=("none", "int8", "nf4"), default="none")
    parser.add_argument("--size", default="560m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--warm_up", type=int, default=1, help="steps before the timed ones; on a GPU the first compile"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max_grad_norm", type=float, default=0.0, help="clip gradients; 0: do not")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="what bloomlm's steps (in the precision of the first side) spend their time on",
    )
    args = parser.parse_args()
    if args.base_quantization != "none" and args.tuning != "lora":
        parser.error(f"--base_quantization {args.base_quantization} is for --tuning lora, not {args.tuning}")
    if args.side:
        print(json.dumps(run(args)))
        return
    random_model(args.size)
    if args.profile:
        print_profile(args)
        return
    arguments = ["--tuning", args.tuning, "--size", args.size, "--steps", str(args.steps)]
    arguments += ["--batch_size", str(args.batch_size), "--warm_up", str(args.warm_up), "--device", args.device]
    arguments += ["--base_quantization", args.base_quantization, "--max_grad_norm", str(args.max_grad_norm)]
    results = alternate(__file__, args.sides, args.rounds, arguments)
    base = "" if args.base_quantization == "none" else f" on {args.base_quantization}"
    print(f"{args.tuning} fine-tuning{base}, bloom-{args.size} shape; {machine(args.device)}")
    print(f"{'':16}{'tokens/s':>10}{'ratio':>7}{'peak GB':>10}{'ratio':>7}{'of peak':>10}  losses")
    needed = max(median(rounds, "tflop_a_token") for rounds in results.values()) * 1e3
    first_speed, first_memory = (median(results[args.sides[0]], key) for key in ("tokens_per_second", "peak_memory_gb"))
    for side, rounds in results.items():
        for found in rounds:
            found["of_peak"] = found["tokens_per_second"] * needed / found["peak_gflops"]
            found["last_loss"] = found["losses"][-1]
        losses = " ".join(f"{loss:.5f}" for loss in rounds[0]["losses"])
        speed, memory, utilisation = (median(rounds, k) for k in ("tokens_per_second", "peak_memory_gb", "of_peak"))
        ratios = f"{speed / first_speed:7.2f}{memory:10.2f}{memory / first_memory:7.2f}"
        print(f"{side:16}{speed:10.1f}{ratios}{utilisation:10.0%}  {losses}")
    record(results)


if __name__ == "__main__":
    main()
