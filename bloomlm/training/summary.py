"""What a run shows at its end: its numbers, its files, and commands that use them."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bloomlm.data.splits import BUILTIN_PREFIX
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.layout import own_bounds, whole_shape
from bloomlm.parallel.mesh import Mesh
from bloomlm.training.history import ALL_RESULTS_FILE, ANSWERS_FILE, METRICS_FILE
from bloomlm.training.meter import PROFILE_DIRECTORY
from bloomlm.training.output_dir import RUN_FILE
from bloomlm.training.report import TENSORBOARD_DIRECTORY, duration, size
from bloomlm.training.results import FinetuneResult
from bloomlm.training.run_plan import RunPlan

_LONGEST_PROMPT = 100

_EVAL_NAMES = {
    "eval_loss": "loss on the evaluation examples",
    "eval_ppl": "perplexity",
    "eval_accuracy": "tokens predicted right",
    "eval_exact_match": "answers that match exactly",
    "eval_rouge1": "ROUGE-1",
    "eval_rouge2": "ROUGE-2",
    "eval_rougeL": "ROUGE-L",
    "eval_bleu4": "BLEU-4 (0 to 100)",
    "eval_chrf": "chrF (0 to 100)",
}


def describe_parameters(model: BloomForCausalLM, mesh: Mesh) -> str:
    """How many parameters there are, how many of them learn, and which part of them each rank has."""
    sizes = {name: math.prod(whole_shape(name, p, mesh)) for name, p in model.named_parameters()}
    total, learned = sum(sizes.values()), sum(sizes[n] for n, p in model.named_parameters() if p.requires_grad)
    line = f"model: {total:,} parameters, {learned:,} ({learned / total:.2%}) of them learn"
    if mesh.is_alone:
        return line
    own = sum(math.prod(stop - start for start, stop in own_bounds(n, p, mesh)) for n, p in model.named_parameters())
    return f"{line}; {mesh.degrees} have {own / total:.1%} of them each"


def run_title(plan: RunPlan) -> str:
    """What learns what, as the title of the picture of a run that trains."""
    data = plan.data.dataset_name_or_path or Path(plan.data.train_file or "").name
    how = plan.adapter.describe()
    if smoothing := _label_smoothing(plan):
        how += f", label smoothing {smoothing:g} in training"
    name = plan.model.name_or_path
    return f"{name if ':' in name else '/'.join(Path(name).parts[-2:])} on {data}\n{how}"


def print_summary(console: Console, plan: RunPlan, outcome: FinetuneResult, example_prompt: str) -> None:
    """Show how a run ended.

    Args:
        console: where to show it.
        plan: of the run.
        outcome: of the run.
        example_prompt: a prompt like those of the examples.
    """
    numbers = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    for name, value in {**_train_rows(plan, outcome), **_eval_rows(outcome.eval_metrics)}.items():
        numbers.add_row(name, value)
    console.print("\nResult", style="italic")
    console.print(numbers)
    console.print("\nFiles", style="italic")
    for name, path in _files(plan, outcome).items():
        console.print(f"  {name:<18} {path}", markup=False, highlight=False, soft_wrap=True)
    console.print("\nNext", style="italic")
    for command in next_commands(plan, outcome, example_prompt):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def next_commands(plan: RunPlan, outcome: FinetuneResult, example_prompt: str) -> list[str]:
    """Commands that use the results of a run, ready to be pasted."""
    output_dir = str(outcome.output_dir)
    prompt = example_prompt if example_prompt and len(example_prompt) <= _LONGEST_PROMPT else "Your prompt"
    if outcome.train_metrics is None:
        model = ["--model_name_or_path", plan.model.name_or_path]
    elif plan.adapter.trains_base:
        model = ["--model_name_or_path", output_dir]
    else:
        model = ["--model_name_or_path", plan.model.name_or_path, f"--{plan.adapter.path_flag}", output_dir]
    commands = [f"{shlex.join(['bloomlm', 'predict', *model, '--prompt'])} {_quoted(prompt)}"]
    dataset = plan.data.dataset_name_or_path or ""
    data_file = plan.data.eval_file or (dataset if dataset.startswith(BUILTIN_PREFIX) else None)
    if data_file is not None:
        commands.append(shlex.join(["bloomlm", "predict", *model, "--data_file", data_file]))
    if outcome.train_metrics is not None and plan.report.use_tensorboard:
        commands.append(shlex.join(["tensorboard", "--logdir", str(outcome.output_dir / TENSORBOARD_DIRECTORY)]))
    return commands


def _label_smoothing(plan: RunPlan) -> float:
    return 0.0 if plan.training is None else plan.training.step.label_smoothing


def _quoted(text: str) -> str:
    """A text as one word of a shell command; bash and zsh understand $'...'."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{escaped}'"


def _train_rows(plan: RunPlan, outcome: FinetuneResult) -> dict[str, str]:
    metrics = outcome.train_metrics
    if metrics is None:
        return {}
    smoothing = ", with label smoothing" if _label_smoothing(plan) else ""
    rows = {
        "steps": f"{outcome.step:,} ({metrics['epoch']:.2f} epochs)",
        "loss in training": f"{metrics['train_loss']:.4f} (mean of the run{smoothing})",
    }
    if metrics["train_runtime"] > 0:
        speed = f"{metrics['train_tokens_per_second']:,.0f} tokens/s"
        rows["time in steps"] = f"{duration(metrics['train_runtime'])} ({speed})"
        peak = f"{metrics['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        rows["utilisation"] = f"{metrics['model_flops_utilisation']:.0%} of the {peak} that matrix products reach here"
    if metrics["padding_avoided"] > 0:
        rows["padding avoided"] = f"{metrics['padding_avoided']:.0%} of what padded batches would compute"
    kinds = ", ".join(f"{name} {size(count)}" for name, count in metrics["memory_bytes"].items())
    return {**rows, "peak memory": f"{size(metrics['peak_memory_bytes'])} ({kinds})"}


def _eval_rows(metrics: Mapping[str, Any] | None) -> dict[str, str]:
    return {shown: f"{metrics[name]:.4f}" for name, shown in _EVAL_NAMES.items() if metrics and name in metrics}


def _files(plan: RunPlan, outcome: FinetuneResult) -> dict[str, Path]:
    output_dir = outcome.output_dir
    files: dict[str, Path] = {}
    if outcome.train_metrics is not None:
        files["model" if plan.adapter.trains_base else f"{plan.adapter.kind} adapter"] = output_dir
        if outcome.merged_path is not None:
            files["merged model"] = outcome.merged_path
        if outcome.best_checkpoint is not None:
            files["best checkpoint"] = outcome.best_checkpoint
        if outcome.picture_path is not None:
            files["loss picture"] = outcome.picture_path
        files["metrics by step"] = output_dir / METRICS_FILE
        if plan.report.profile:
            files["profile"] = output_dir / PROFILE_DIRECTORY
    if plan.evaluation.num_written_answers > 0:
        files["answers"] = output_dir / ANSWERS_FILE
    files["results"] = output_dir / ALL_RESULTS_FILE
    files["flags of the run"] = output_dir / RUN_FILE
    return files
