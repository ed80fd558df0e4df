"""The last thing a run shows: its numbers, where everything lies, and the commands to try next."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.gather import own_bounds, whole_shape
from bloomlm.parallel.mesh import Mesh
from bloomlm.training.config import TrainingConfig
from bloomlm.training.profile import PROFILE_DIRECTORY
from bloomlm.training.progress import duration, size

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


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run made, and where it lies."""

    output_dir: Path
    """Holds the trained model or adapter, results and checkpoints."""
    step: int
    """Steps done since the run began."""
    interrupted: bool
    """SIGTERM came: all is saved, the same call goes on."""
    train_metrics: dict[str, Any] | None
    """The content of train_results.json; None without training."""
    eval_metrics: dict[str, Any] | None
    """The content of eval_results.json, of the final model; None without evaluation."""
    best_checkpoint: Path | None
    """The checkpoint with the best evaluation; None without one."""
    merged_path: Path | None
    """The model with its adapter added in; None unless merge_weights."""
    picture_path: Path | None
    """loss.png; None where it could not be drawn."""


def describe_parameters(model: BloomForCausalLM, mesh: Mesh) -> str:
    """How many parameters there are, how many of them learn, and what each rank has of them."""
    sizes = {name: math.prod(whole_shape(name, p, mesh)) for name, p in model.named_parameters()}
    total, learned = sum(sizes.values()), sum(sizes[n] for n, p in model.named_parameters() if p.requires_grad)
    line = f"model: {total:,} parameters, {learned:,} ({learned / total:.2%}) of them learn"
    if mesh.is_alone:
        return line
    own = sum(math.prod(stop - start for start, stop in own_bounds(n, p, mesh)) for n, p in model.named_parameters())
    return f"{line}; {mesh.degrees} have {own / total:.1%} of them each"


def run_title(config: TrainingConfig) -> str:
    """What learns what, for the picture of the run."""
    data = config.dataset_name_or_path or Path(config.train_file or "").name
    how = "whole model"
    if config.lora:
        how = f"LoRA, r {config.r}"
    elif config.prefix_tuning:
        how = f"{config.num_prefix_tokens} prefix tokens"
    if config.label_smoothing:
        how += f", label smoothing {config.label_smoothing:g} in training"
    name = config.model_name_or_path
    return f"{name if ':' in name else '/'.join(Path(name).parts[-2:])} on {data} ({how})"


def print_summary(
    console: Console, config: TrainingConfig, outcome: FinetuneResult, example_prompt: str | None
) -> None:
    """Show how a run ended.

    Args:
        console: where to.
        config: resolved.
        outcome: of the run.
        example_prompt: a prompt like those it learned from.
    """
    numbers = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    for name, value in {**_train_rows(config, outcome), **_eval_rows(outcome.eval_metrics)}.items():
        numbers.add_row(name, value)
    console.print("\nResult", style="italic")
    console.print(numbers)
    console.print("\nFiles", style="italic")
    for name, path in _files(config, outcome).items():
        console.print(f"  {name:<18} {path}", markup=False, highlight=False, soft_wrap=True)
    console.print("\nNext", style="italic")
    for command in next_commands(config, outcome, example_prompt):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def next_commands(config: TrainingConfig, outcome: FinetuneResult, example_prompt: str | None) -> list[str]:
    """Commands that use what the run made, ready to be pasted."""
    output_dir = str(outcome.output_dir)
    prompt = example_prompt if example_prompt and len(example_prompt) <= _LONGEST_PROMPT else "Your prompt"
    if outcome.train_metrics is None:
        model = ["--model_name_or_path", config.model_name_or_path]
    elif config.lora or config.prefix_tuning:
        flag = "--lora_path" if config.lora else "--prefix_path"
        model = ["--model_name_or_path", config.model_name_or_path, flag, output_dir]
    else:
        model = ["--model_name_or_path", output_dir]
    commands = [f"{shlex.join(['bloomlm', 'predict', *model, '--prompt'])} {_quoted(prompt)}"]
    data_file = config.eval_file or (
        config.dataset_name_or_path if (config.dataset_name_or_path or "").startswith("builtin:") else None
    )
    if data_file is not None:
        commands.append(shlex.join(["bloomlm", "predict", *model, "--data_file", data_file]))
    if outcome.train_metrics is not None and config.report_to == "tensorboard":
        commands.append(shlex.join(["tensorboard", "--logdir", str(outcome.output_dir / "runs")]))
    return commands


def _quoted(text: str) -> str:
    """A text as one word of a shell's line; bash and zsh read $'...'."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{escaped}'"


def _train_rows(config: TrainingConfig, outcome: FinetuneResult) -> dict[str, str]:
    metrics = outcome.train_metrics
    if metrics is None:
        return {}
    smoothing = ", with label smoothing" if config.label_smoothing else ""
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


def _files(config: TrainingConfig, outcome: FinetuneResult) -> dict[str, Path]:
    output_dir = outcome.output_dir
    files: dict[str, Path] = {}
    if outcome.train_metrics is not None:
        kind = "LoRA adapter" if config.lora else "prefix adapter" if config.prefix_tuning else "model"
        files[kind] = output_dir
        if outcome.merged_path is not None:
            files["merged model"] = outcome.merged_path
        if outcome.best_checkpoint is not None:
            files["best checkpoint"] = outcome.best_checkpoint
        if outcome.picture_path is not None:
            files["loss picture"] = outcome.picture_path
        files["metrics by step"] = output_dir / "metrics.jsonl"
        if config.profile:
            files["profile"] = output_dir / PROFILE_DIRECTORY
    if config.generate_num > 0:
        files["answers"] = output_dir / "infer_result.json"
    files["results"] = output_dir / "all_results.json"
    files["flags of the run"] = output_dir / "run.yaml"
    return files
