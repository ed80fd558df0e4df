"""`bloomlm export`: turns a model, with its adapter merged in, into a program that runs without the model's code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bloomlm.api import dtype_of, load
from bloomlm.cli.options import config_command
from bloomlm.errors import ConfigError
from bloomlm.export.formats import FORMATS
from bloomlm.export.parity import Parity
from bloomlm.export.program import ExportResult, export_program
from bloomlm.flags import Dtype, ModelFlags, flag


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelFlags):
    """The flags of `bloomlm export`."""

    output_path: Path = flag(
        "program",
        Path("inference/bloom"),
        "directory and name of the program: inference/bloom writes inference/bloom.* and the tokenizer",
    )
    dtype: Dtype | None = flag(
        "program", None, "precision of the matrices on disk and in memory  [default: the model's]"
    )
    quantization: Literal["none", "int8", "int4"] = flag(
        "program",
        "none",
        "round matrices to 8 bits (smaller and faster) or 4 bits (smallest and fastest, with larger errors)",
    )
    calibration_file: str | None = flag(
        "program",
        None,
        "texts like those that the program will read, some 65,000 tokens (.txt, .jsonl, a directory); int4 is rounded "
        "so that the program differs least on them",
    )
    format: str = flag(
        "program",
        "pt2",
        "files to write, for PyTorch (pt2), onnxruntime, OpenVINO or llama.cpp (gguf)",
        choices=FORMATS,
    )
    max_length: int = flag("program", 128, "default of --max_new_tokens of `bloomlm infer`", minimum=1)
    no_verify: bool = flag("program", False, "do not compare the program with the model")


def export(config: ExportConfig) -> None:
    """Run `bloomlm export`.

    Raises:
        BloomlmError: flags or files that cannot be used, or a program that differs from the model.
    """
    if config.quantization != "none" and config.dtype is not None:
        raise ConfigError(f"--dtype has no effect with --quantization {config.quantization}; leave out one of them")
    messages = Console(stderr=True, highlight=False, markup=False)
    loaded = load(config.model_name_or_path, **config.load_options())
    columns = TextColumn("{task.description:10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as progress:
        task = progress.add_task("reading", total=1.0)
        result = export_program(
            loaded.model,
            loaded.tokenizer,
            config.output_path,
            source=config.model_name_or_path,
            format=config.format,
            dtype=dtype_of(config.dtype),
            quantization=config.quantization,
            calibration_file=config.calibration_file,
            max_new_tokens=config.max_length,
            verify=not config.no_verify,
            on_stage=lambda stage, share: progress.update(task, description=stage, completed=share),
        )
        progress.update(task, description="done", completed=1.0)
    _report(Console(highlight=False, markup=False), config, result)


def _report(console: Console, config: ExportConfig, result: ExportResult) -> None:
    for name, size in result.files.items():
        console.print(f"{result.path.parent / name}: {size / 1e6:,.1f} MB", soft_wrap=True)
    if result.parity is not None:
        for line in _parity_lines(result.parity):
            console.print(line, soft_wrap=True)
    if result.not_compared is not None:
        console.print(f"not compared with the model: {result.not_compared}", soft_wrap=True)
    directory, prefix = result.path.parent, result.path.name
    console.print(f"next: bloomlm infer --model_dir {directory} --model_prefix {prefix} --prompt ...", soft_wrap=True)


def _parity_lines(parity: Parity) -> list[str]:
    return [
        f"compared with the model at {parity.num_positions} positions:",
        f"  logits     relative error {parity.logits_error:.2g}, largest difference {parity.largest_difference:.2g}",
        f"  tokens     {parity.equal_tokens:.1%} of the likeliest tokens equal",
        f"  perplexity {parity.program_perplexity:.4f}, the model's {parity.model_perplexity:.4f} "
        f"({parity.perplexity_change:+.2%})",
    ]


command = config_command(
    "export",
    ExportConfig,
    export,
    help="""Turn a model, with its adapter merged in, into a program that runs without the model's code.

    `bloomlm infer` runs the program. It is compiled if there is a C++ compiler, and compared with the model before it
    replaces an older one.

    \b
    bloomlm export --model_name_or_path builtin:tiny --output_path inference/bloom
    bloomlm export --model_name_or_path builtin:tiny --lora_path demo --quantization int8 --output_path inference/dates
    """,
)
