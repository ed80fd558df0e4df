"""`bloomlm export`: turn a model, its adapter folded in, into a program that runs without the model's code."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bloomlm.api import DTYPES
from bloomlm.cli.completion import about
from bloomlm.cli.loading import load_named
from bloomlm.cli.options import config_command
from bloomlm.errors import ConfigError
from bloomlm.export.parity import Parity
from bloomlm.export.program import ExportResult, export_program


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The flags of `bloomlm export`."""

    model_name_or_path: str = field(
        metadata=about("model", "builtin:tiny, a directory, or a hub name such as bigscience/bloom-560m")
    )
    lora_path: str | None = field(default=None, metadata=about("model", "LoRA adapter to add into the weights"))
    prefix_path: str | None = field(
        default=None, metadata=about("model", "prefix adapter, whose virtual tokens begin every cache")
    )
    prefix_layout: Literal["old", "new"] | None = field(
        default=None, metadata=about("model", "of a prefix in PaddleNLP's files: old to August 2023, new after it")
    )
    trained_tensor_parallel_degree: int | None = field(
        default=None,
        metadata=about("model", "ranks that trained an adapter in PaddleNLP's files, where they do not tell"),
    )
    paddle_tokenization: bool = field(
        default=False,
        metadata=about("model", "with vocab.json and merges.txt: cut words as PaddleNLP did, not as BLOOM"),
    )
    output_path: Path = field(
        default=Path("inference/bloom"),
        metadata=about("program", "directory and prefix: inference/bloom writes inference/bloom.* and the tokenizer"),
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata=about("program", "precision that matrices are kept in  [default: the model's]")
    )
    quantization: Literal["none", "int8", "int4"] = field(
        default="none", metadata=about("program", "keep matrices in 8 or 4 bits, which is faster and less exact")
    )
    format: Literal["pt2", "onnx", "openvino", "gguf"] = field(
        default="pt2",
        metadata=about("program", "what will run it: PyTorch (pt2), onnxruntime, OpenVINO, llama.cpp (gguf)"),
    )
    max_length: int = field(
        default=128, metadata=about("program", "tokens that infer generates where it is not told otherwise")
    )
    no_verify: bool = field(
        default=False, metadata=about("program", "leave out the comparison with the model at the end")
    )


def export(config: ExportConfig) -> None:
    """Run `bloomlm export`.

    Raises:
        BloomlmError: flags or files that cannot be used, or a program that differs from the model.
    """
    if config.quantization != "none" and config.dtype is not None:
        raise ConfigError(f"--dtype has no effect with --quantization {config.quantization}; leave out one of them")
    if config.max_length < 1:
        raise ConfigError(f"--max_length is {config.max_length}; it must be at least 1")
    messages = Console(stderr=True, highlight=False, markup=False)
    loaded = load_named(config, prefix_path=config.prefix_path)
    columns = TextColumn("{task.description:10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as progress:
        task = progress.add_task("reading", total=1.0)
        result = export_program(
            loaded.model,
            loaded.tokenizer,
            config.output_path,
            source=config.model_name_or_path,
            format=config.format,
            dtype=None if config.dtype is None else DTYPES[config.dtype],
            quantization=config.quantization,
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
    help="""Turn a model, its adapter folded in, into a program that runs without the model's code.

    The program is compiled where a C++ compiler is found, and compared with the model before it is put in its place.
    """,
)
