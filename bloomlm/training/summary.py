"""What describes a run: its parameters, and at its end the numbers, the files, commands that use them and a picture.

The picture needs the `plots` extra.
"""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bloomlm.data.splits import BUILTIN_PREFIX
from bloomlm.errors import format_bytes
from bloomlm.files.atomic import atomic_write
from bloomlm.files.picture import has_matplotlib, new_figure, png_of, tidy
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.quantized import weights_per_element
from bloomlm.parallel.layout import own_bounds, whole_shape
from bloomlm.parallel.mesh import Mesh
from bloomlm.training.evaluate_text import BITS_PER_BYTE
from bloomlm.training.meter import PROFILE_DIRECTORY
from bloomlm.training.output_dir import RUN_FILE, changed_flags
from bloomlm.training.report import METRICS_FILE, duration
from bloomlm.training.reporters.base import RUNS_DIRECTORY
from bloomlm.training.results import ALL_RESULTS_FILE, ANSWERS_FILE, FinetuneResult, History
from bloomlm.training.run_plan import RunPlan

PICTURE_FILE = "loss.png"

_TRAIN, _EVAL, _RATE = "#2563a8", "#d1622b", "#4b8b5e"
_MANY_POINTS = 60
_LOG_RANGE = 25

_LONGEST_PROMPT = 100

_EVAL_NAMES = {
    "eval_loss": "loss on the evaluation examples",
    "eval_ppl": "perplexity",
    "eval_bits_per_byte": "bits per byte",
    "eval_accuracy": "tokens predicted correctly",
    "eval_rewards_chosen": "reward of chosen answers",
    "eval_rewards_rejected": "reward of rejected answers",
    "eval_rewards_margin": "difference of the rewards",
    "eval_rewards_accuracy": "pairs in the right order",
    "eval_kl": "divergence from the reference model",
    "eval_chosen_nll": "cross entropy of chosen sequences",
    "eval_exact_match": "answers that match exactly",
    "eval_rouge1": "ROUGE-1",
    "eval_rouge2": "ROUGE-2",
    "eval_rougeL": "ROUGE-L",
    "eval_bleu4": "BLEU-4 (0 to 100)",
    "eval_chrf": "chrF (0 to 100)",
}


def describe_parameters(model: BloomForCausalLM, mesh: Mesh) -> str:
    """How many parameters there are, how many of them learn, and which fraction of them each rank holds."""
    sizes = {
        name: math.prod(whole_shape(name, p, mesh)) * weights_per_element(p) for name, p in model.named_parameters()
    }
    total, learned = sum(sizes.values()), sum(sizes[n] for n, p in model.named_parameters() if p.requires_grad)
    line = f"model: {total:,} parameters, {learned:,} ({learned / total:.2%}) of them learn"
    if mesh.is_alone:
        return line
    own = sum(math.prod(stop - start for start, stop in own_bounds(n, p, mesh)) for n, p in model.named_parameters())
    return f"{line}; {mesh.degrees} hold {own / total:.1%} of them each"


def show_notices(plan: RunPlan, checkpoint: Path | None, console: Console) -> None:
    """Print a line for each flag that does nothing or was decided, and for the checkpoint that a run resumes from."""
    notices = list(plan.notices)
    if checkpoint is not None:
        changes = changed_flags(plan.flags)
        notices.append(f"resuming from {checkpoint}" + (f"; changed since the run began: {changes}" if changes else ""))
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


def run_title(plan: RunPlan) -> str:
    """Title of the picture: the model, the training data, and how the model learns."""
    data = plan.data.dataset_name_or_path or Path(plan.data.train_file or plan.data.mixture or "").name
    how = ", ".join(filter(None, (plan.adapter.describe(), plan.objective.describe())))
    name = plan.model.name_or_path
    return f"{name if ':' in name else '/'.join(Path(name).parts[-2:])} on {data}\n{how}"


def print_summary(console: Console, plan: RunPlan, outcome: FinetuneResult, example_prompt: str) -> None:
    """Print the numbers and the files of a finished run, and commands that use them with an example's prompt."""
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
    """Shell commands that use the results of a run; `example_prompt` is empty for raw text, which has none."""
    output_dir = str(outcome.output_dir)
    prompt = example_prompt if example_prompt and len(example_prompt) <= _LONGEST_PROMPT else "Your prompt"
    if outcome.train_metrics is None:
        model = ["--model_name_or_path", plan.model.name_or_path]
    elif plan.adapter.trains_base:
        model = ["--model_name_or_path", output_dir]
    else:
        model = ["--model_name_or_path", plan.model.name_or_path, f"--{plan.adapter.path_flag}", output_dir]
    if plan.data.chat_template is not None:
        return [shlex.join(["bloomlm", "chat", *model]), *_tensorboard_command(plan, outcome)]
    commands = [f"{shlex.join(['bloomlm', 'predict', *model, '--prompt'])} {_quoted(prompt)}"]
    dataset = plan.data.dataset_name_or_path or ""
    data_file = plan.data.eval_file or (dataset if dataset.startswith(BUILTIN_PREFIX) else None)
    if data_file is not None and example_prompt:
        commands.append(shlex.join(["bloomlm", "predict", *model, "--data_file", data_file]))
    return [*commands, *_tensorboard_command(plan, outcome)]


def _tensorboard_command(plan: RunPlan, outcome: FinetuneResult) -> list[str]:
    if outcome.train_metrics is None or "tensorboard" not in plan.report.trackers:
        return []
    return [shlex.join(["tensorboard", "--logdir", str(outcome.output_dir / RUNS_DIRECTORY)])]


def _quoted(text: str) -> str:
    """A text as one word of a shell command. Line ends and tabs need the form $'...' of bash and zsh."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{escaped}'"


def _train_rows(plan: RunPlan, outcome: FinetuneResult) -> dict[str, str]:
    metrics = outcome.train_metrics
    if metrics is None:
        return {}
    mean = ", ".join(filter(None, ("mean of the run", plan.objective.describe())))
    rows = {
        "steps": f"{outcome.step:,} ({metrics['epoch']:.2f} epochs)",
        "loss in training": f"{metrics['train_loss']:.4f} ({mean})",
    }
    if metrics["train_runtime"] > 0:
        speed = f"{metrics['train_tokens_per_second']:,.0f} tokens/s"
        rows["time in steps"] = f"{duration(metrics['train_runtime'])} ({speed})"
        peak = f"{metrics['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        rows["utilisation"] = (
            f"{metrics['model_flops_utilisation']:.0%} of the {peak} that matrix products reach on this machine"
        )
    if metrics["padding_avoided"] > 0:
        rows["padding avoided"] = f"{metrics['padding_avoided']:.0%} of the tokens that padded batches would compute"
    kinds = ", ".join(f"{name} {format_bytes(count)}" for name, count in metrics["memory_bytes"].items())
    return {**rows, "peak memory": f"{format_bytes(metrics['peak_memory_bytes'])} ({kinds})"}


def _eval_rows(metrics: Mapping[str, Any] | None) -> dict[str, str]:
    metrics = metrics or {}
    rows = {shown: f"{metrics[name]:.4f}" for name, shown in _EVAL_NAMES.items() if name in metrics}
    for name, value in metrics.items():
        kind, _, group = name.partition("/")  # of a source, or of language/NAME
        if group and kind == BITS_PER_BYTE:
            rows[f"bits per byte, {group.replace('/', ' ')}"] = (
                f"{value:.4f} (loss {metrics[f'eval_loss/{group}']:.4f})"
            )
    return rows


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


def write_picture(history: History, output_dir: Path, plan: RunPlan) -> Path | None:
    """Draw loss.png and return its path; return None if matplotlib is not installed."""
    if not has_matplotlib():
        return None
    path = output_dir / PICTURE_FILE
    draw_losses(history.log_history, path, run_title(plan), plan.objective.loss_unit)
    return path


def draw_losses(log_history: Sequence[dict[str, Any]], path: Path, title: str, loss_unit: str) -> None:
    """Draw the log of a run into a PNG file: training and evaluation loss above, learning rate below.

    Args:
        log_history: entries in the order of steps, each with step and any of loss, learning_rate and eval_loss.
        path: the file to write.
        title: shown above the picture.
        loss_unit: over what the loss is a mean, in the singular.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 5.6)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_loss_panel(losses, log_history)
    losses.set_ylabel(f"loss per {loss_unit} (nats)")
    steps, values = _series(log_history, "learning_rate")
    rates.plot(steps, values, color=_RATE, linewidth=1.6, marker="o" if len(steps) == 1 else None)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step (updates of the weights)")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tidy(losses, rates)
    figure.suptitle(title, fontsize=11)
    atomic_write(path, png_of(figure))


def _draw_loss_panel(axes: Any, log_history: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    steps, values = _series(log_history, "loss")
    if len(steps) > _MANY_POINTS:
        axes.plot(steps, values, color=_TRAIN, alpha=0.3, linewidth=0.8)
        width = len(steps) // 30
        axes.plot(steps, smoothed(values, width), color=_TRAIN, linewidth=1.8, label=f"training, mean of {width} logs")
    else:
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, values, color=_TRAIN, linewidth=1.6, marker=marker, markersize=3.5, label="training")
    eval_steps, eval_values = _series(log_history, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_values, color=_EVAL, marker="o", markersize=4.5, linewidth=1.6, label="evaluation")
        best = min(range(len(eval_values)), key=eval_values.__getitem__)
        axes.annotate(
            f"lowest {eval_values[best]:.4g}",
            (eval_steps[best], eval_values[best]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right" if best == len(eval_values) - 1 and best > 0 else "center",
            color=_EVAL,
            fontsize=9,
        )
    if steps or eval_steps:
        axes.legend(frameon=False)
        low, high = min([*values, *eval_values]), max([*values, *eval_values])
        if low > 0 and high > _LOG_RANGE * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())


def _series(log_history: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [
        (entry["step"], entry[name])
        for entry in log_history
        if entry.get(name) is not None and math.isfinite(entry[name])
    ]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and those up to width // 2 places beside it; values near the ends have fewer."""
    reach = width // 2
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
