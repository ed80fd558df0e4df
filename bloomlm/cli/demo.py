"""`bloomlm demo`: fine-tunes the built-in model on the built-in data and shows what it learned, in a few minutes."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bloomlm.api import LoadedModel, load
from bloomlm.cli.options import config_command
from bloomlm.data.example import Example
from bloomlm.data.examples import load_examples
from bloomlm.data.splits import open_dataset
from bloomlm.errors import DataError
from bloomlm.flags import Flags, flag
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune

MODEL = "builtin:tiny"
DATASET = "builtin:dates"
MAX_NEW_TOKENS = 16
BATCH_SIZE = 64
NUM_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Flags):
    """The flags of `bloomlm demo`."""

    output_dir: str = flag("demo", "demo", "directory to write the adapter, the report and a plot of the loss to")
    num_train_epochs: float = flag("demo", 4.0, "passes through the 5,320 training dates", above=0)


def demo(config: DemoConfig) -> None:
    """Fine-tune builtin:tiny with LoRA on builtin:dates and show held-out answers before and after."""
    console = Console(highlight=False)
    started = time.perf_counter()
    base = load(MODEL, dtype="float32")
    held_out = _held_out(base)
    console.print(f"[bold]1.[/] {MODEL} answers {len(held_out)} held-out dates of {DATASET} before training")
    before = _answers(base, held_out, console)
    console.print(f"   exact match: {_exact_match(before, held_out):.1%}\n")

    console.print(f"[bold]2.[/] LoRA on the training dates: {_command(config)}", soft_wrap=True)
    finetune(_training_config(config))

    console.print(f"\n[bold]3.[/] {MODEL} with the adapter answers the same held-out dates")
    after = _answers(load(MODEL, lora_path=config.output_dir, dtype="float32"), held_out, console)
    _show(console, held_out, before, after)
    console.print(
        f"\nexact match on held-out dates: [bold]{_exact_match(before, held_out):.1%}[/] before, "
        f"[bold]{_exact_match(after, held_out):.1%}[/] after ({time.perf_counter() - started:.0f} s in all)"
    )
    _show_next(console, Path(config.output_dir))


def _training_config(config: DemoConfig) -> TrainingConfig:
    return TrainingConfig(
        model_name_or_path=MODEL,
        dataset_name_or_path=DATASET,
        output_dir=config.output_dir,
        overwrite_output_dir=True,
        lora=True,
        r=16,
        target_modules=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        learning_rate=3e-3,
        num_train_epochs=config.num_train_epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        warmup_ratio=0.05,
        lr_scheduler_type="cosine",
        do_train=True,
        do_eval=True,
        logging_steps=10,
        eval_steps=100,
        save_steps=200,
        save_total_limit=1,
    )


def _command(config: DemoConfig) -> str:
    """The same run as a command line."""
    given = _training_config(config)
    flags = ("model_name_or_path", "dataset_name_or_path", "output_dir", "lora", "r", "learning_rate")
    return "bloomlm finetune " + " ".join(f"--{name} {getattr(given, name)}" for name in flags) + " ..."


def _held_out(base: LoadedModel) -> list[Example]:
    test = open_dataset(DATASET).test
    if test is None:
        raise DataError(f"{DATASET} has no test split; is the installation complete?")
    return list(load_examples(test, base.tokenizer, src_length=512, tgt_length=MAX_NEW_TOKENS, show_progress=False))


def _answers(model: LoadedModel, examples: list[Example], console: Console) -> list[str]:
    prompts = [example.source_text for example in examples]
    starts = range(0, len(prompts), BATCH_SIZE)
    answers: list[str] = []
    for start in track(starts, "   generating", console=console, transient=True, disable=not console.is_terminal):
        batch = prompts[start : start + BATCH_SIZE]
        completions = model.generate(batch, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)
        answers += [completion.completion.strip() for completion in completions]
    return answers


def _exact_match(answers: list[str], examples: list[Example]) -> float:
    return sum(a == example.target_text for a, example in zip(answers, examples, strict=True)) / len(examples)


def _show(console: Console, examples: list[Example], before: list[str], after: list[str]) -> None:
    table = Table("date as people write it", "right answer", "before", "after")
    for index in range(0, len(examples), max(1, len(examples) // NUM_SHOWN)):
        source = examples[index].source_text.removeprefix("Date: ").partition("\n")[0]
        table.add_row(source, examples[index].target_text, before[index].partition("\n")[0][:16], after[index])
    console.print(table)


def _show_next(console: Console, output_dir: Path) -> None:
    lines = (
        "",
        f"adapter (PEFT's files)  {output_dir}/adapter_model.safetensors",
        f"plot of the loss        {output_dir}/loss.png",
        f"report                  {output_dir}/all_results.json; each logged step: {output_dir}/metrics.jsonl",
        "",
        "Try next",
        f"  bloomlm predict --model_name_or_path {MODEL} --lora_path {output_dir} \\",
        "      --prompt $'Date: 14 juillet 1989\\nISO:'",
        "  bloomlm finetune --help",
        f"  bloomlm serve --model_name_or_path {MODEL} --lora dates={output_dir} --runs .",
        "      # then open http://127.0.0.1:8000/ to write with it and to see the run's curves (extra `serve`)",
    )
    for line in lines:
        console.print(line, soft_wrap=True)


command = config_command(
    "demo",
    DemoConfig,
    demo,
    help="""Fine-tune the built-in model on the built-in dates and show what it learned.

    A model of 1 million parameters learns with LoRA to turn dates in 18 languages into ISO 8601. This takes a few
    minutes on two CPU cores and needs no network.

    \b
    bloomlm demo --output_dir demo
    """,
)
