"""Evaluations on a random model of bloom-560m's shape: bloomlm beside lm-eval with transformers, same files.

    python benchmarks/evaluate.py --task lambada --file lambada_test.jsonl --limit 64
    python benchmarks/evaluate.py --task wikitext --file wiki.test.tokens --limit 2
    python benchmarks/evaluate.py --task sliding --file wiki.valid.tokens --limit 32

`lambada` and `wikitext` run lm-eval's own code on one side and the lm_eval protocol on the other; `sliding` runs the
reference protocol against its windows done as its script did, padded, with all logits, through transformers. fp32, the
tokenizer of builtin:tiny (no other comes with bloomlm), so texts have about twice the tokens that BLOOM's would give.
Prints seconds, CPU seconds (which a busy machine disturbs less), the numbers of both sides and the ratios.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from common import alternate, machine, median, peak_memory_bytes, random_model, record

SEQ_LENGTH = 512
OVERLAP = 32


def model_directory(size: str) -> Path:
    """The random model with a tokenizer beside it."""
    directory = random_model(size)
    if not (directory / "tokenizer.json").exists():
        from bloomlm.checkpoint.source import resolve_source

        tiny = resolve_source("builtin:tiny").directory
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(tiny / name, directory / name)
    return directory


def run_bloomlm(args: argparse.Namespace) -> dict[str, float]:
    """Our metrics; yields nothing before the model is there."""
    from bloomlm.allocator import keep_freed_memory
    from bloomlm.api import evaluate, load

    keep_freed_memory()  # as every command does
    bloom = load(model_directory(args.size))
    warm_up(lambda: bloom.generate("a", max_new_tokens=1))
    start = Clock()
    protocol = "reference" if args.task == "sliding" else "lm_eval"
    report = evaluate(
        bloom,
        eval_path=args.file,
        protocol=protocol,
        cloze_eval=args.task == "lambada",
        limit=args.limit,
        batch_size=args.batch_size,
    )
    return {**start.stop(), **{name: metric.value for name, metric in report.metrics.items()}}


def run_lm_eval(args: argparse.Namespace) -> dict[str, float]:
    """lm-eval's results with its own transformers model."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.wikitext import preprocess_wikitext

    from bloomlm.evaluation.data_sources import read_passages, read_text, split_documents

    if args.task == "lambada":
        rows = [{"text": passage.text} for passage in read_passages(Path(args.file))]
        task = {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        }
    else:
        rows = [{"page": page} for page in split_documents(read_text(Path(args.file)))]
        task = {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
            "process_results": preprocess_wikitext.process_results,
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.environ["HF_DATASETS_CACHE"] = directory
        task |= {
            "task": "here",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        loaded = TaskManager(include_defaults=False).load([task])
        # a window of 2048 tokens at a time: its logits and their softmax take 4 GB
        batch_size = args.batch_size if args.task == "lambada" else 1
        path = str(model_directory(args.size))
        model = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=batch_size, max_length=2048)
        warm_up(lambda: model.model(torch.tensor([[5]])))
        start = Clock()
        results = lm_eval.evaluate(lm=model, task_dict=loaded, limit=args.limit, bootstrap_iters=0)
        times = start.stop()
    found = {name: value for name, value in results["results"]["here"].items() if name.endswith(",none")}
    return {**times, **{name.removesuffix(",none"): found[name] for name in found if "stderr" not in name}}


def run_naive(args: argparse.Namespace) -> dict[str, float]:
    """The reference system's loop: padded windows, all logits, a mask on the losses."""
    import math

    import torch
    from transformers import AutoModelForCausalLM

    from bloomlm.data.tokenizer import Tokenizer
    from bloomlm.evaluation.data_sources import detokenize, read_text

    directory = model_directory(args.size)
    tokenizer = Tokenizer.from_directory(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    pad = tokenizer.pad_token_id
    warm_up(lambda: model(torch.tensor([[5]])))
    start = Clock()
    ids = tokenizer.encode(detokenize(read_text(Path(args.file))))
    count = min(args.limit, max(math.ceil((len(ids) - 1 - OVERLAP) / OVERLAP) + 1, 1))
    total = 0.0
    with torch.no_grad():
        for first in range(0, count, args.batch_size):
            pieces = []
            for number in range(first, min(first + args.batch_size, count)):
                piece = ids[number * OVERLAP : number * OVERLAP + SEQ_LENGTH + 1]
                pieces.append(piece + [pad] * (SEQ_LENGTH + 1 - len(piece)))
            tokens = torch.tensor(pieces)
            mask = (tokens[:, :-1] != pad).float()
            mask[1 if first == 0 else 0 :, :-OVERLAP] = 0.0
            logits = model(tokens[:, :-1]).logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits.view(-1, logits.shape[-1]), tokens[:, 1:].flatten(), reduction="none"
            )
            total += float((losses * mask.flatten()).sum())
    targets = min(len(ids) - 1, SEQ_LENGTH + (count - 1) * OVERLAP)
    return {**start.stop(), "avg_loss": total / targets}


class Clock:
    """Wall and CPU seconds from its making on."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
            "peak_memory_gb": peak_memory_bytes() / 1e9,
        }


def warm_up(call) -> None:
    """Touch the weights, which are mapped from the file."""
    call()


SIDES = {"bloomlm": run_bloomlm, "lm_eval": run_lm_eval, "naive": run_naive}
TIMES = ("seconds", "cpu_seconds", "peak_memory_gb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--task", choices=("lambada", "wikitext", "sliding"), required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--size", default="560m")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    model_directory(args.size)
    arguments = ["--task", args.task, "--file", args.file, "--limit", str(args.limit)]
    arguments += ["--size", args.size, "--batch_size", str(args.batch_size)]
    peer = "naive" if args.task == "sliding" else "lm_eval"
    results = alternate(__file__, (peer, "bloomlm"), args.rounds, arguments, args.threads)
    print(f"{args.task}, first {args.limit}, bloom-{args.size} shape, fp32, {args.threads} threads; {machine()}")
    for side, rounds in results.items():
        numbers = "  ".join(f"{name} {value:.8g}" for name, value in rounds[0].items() if name not in TIMES)
        print(f"{side:8}" + "  ".join(f"{name} {median(rounds, name):.2f}" for name in TIMES) + f"  {numbers}")
    for name in TIMES:
        print(f"{name} ratio: {median(results[peer], name) / median(results['bloomlm'], name):.2f}")
    record(results)


if __name__ == "__main__":
    main()
