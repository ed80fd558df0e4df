"""`bloomlm extend`: more tokens, for a language that a model writes in many small pieces."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bloomlm.api import load
from bloomlm.checkpoint.convert import ModelConversion, open_model_conversion
from bloomlm.checkpoint.formats import FileForm
from bloomlm.checkpoint.output import check_replaceable, output_directory
from bloomlm.checkpoint.source import resolve_source
from bloomlm.checkpoint.writer import parse_size
from bloomlm.cli.display import BytesDisplay
from bloomlm.cli.options import config_command
from bloomlm.data.corpus import Piece, find_corpus
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.flags import REQUIRED, DeviceFlags, Dtype, Flags, ModelFlags, flag, same_flag
from bloomlm.parallel.launch import find_device
from bloomlm.vocabulary.extend import Extension, plan_extension, write_extended
from bloomlm.vocabulary.extend_report import change_line, measure_extension, report_markdown, report_values
from bloomlm.vocabulary.held_out import HeldOut, first_pieces
from bloomlm.vocabulary.merges import learn_merges
from bloomlm.vocabulary.report import number, write_report
from bloomlm.vocabulary.selection import read_vocabulary


@dataclass(frozen=True, kw_only=True)
class ExtendConfig(Flags):
    """What to extend, by which texts, and by how many tokens."""

    model_name_or_path: str = same_flag(ModelFlags, "model_name_or_path")
    corpus: tuple[str, ...] = flag(
        "corpus",
        REQUIRED,
        "files or directories of .txt, .jsonl, .json, .csv or .parquet to learn tokens from, or builtin:dates",
    )
    kept_languages_from: str | None = flag(
        "corpus",
        None,
        "directory with a file or subdirectory of such texts for each language that shall stay as it is; only measured",
    )
    held_out_bytes: int = flag(
        "corpus",
        2**16,
        "bytes of each language to measure, which nothing is learned from; 0: measure nothing, load no model",
        minimum=0,
    )
    add_tokens: int = flag("size", REQUIRED, "number of tokens to add", minimum=1)
    pad_to_multiple_of: int = flag("size", 1, "number of rows to round up to, for tensor parallelism", minimum=1)
    output_path: str = flag("output", REQUIRED, "directory to write; an older model in it is replaced")
    max_shard_size: str = flag("output", "5GB", "largest weight file; a larger model is written in several")
    dtype: Dtype = flag("measuring", "float32", "precision to measure in; the files keep theirs")
    device: str | None = same_flag(DeviceFlags, "device", section="measuring")


def extend(config: ExtendConfig) -> None:
    """Run `bloomlm extend`.

    Raises:
        ConfigError: flags that do not go together.
        DataError: a corpus that cannot be read, or is too small.
        CheckpointError: files cannot be read or written.
    """
    output = Path(config.output_path)
    if output.resolve() == Path(config.model_name_or_path).resolve():
        raise ConfigError(f"--output_path {output} is the model itself; name another directory")
    check_replaceable(output)
    directory = resolve_source(config.model_name_or_path).directory
    source = open_model_conversion(directory, FileForm.HUGGING_FACE)
    tokenizer = Tokenizer.from_directory(directory)
    with BytesDisplay(Console(stderr=True)) as display:
        extension, held_out = _learn(config, source, tokenizer, display)
        values = _measure(config, source, tokenizer, extension, held_out, display)
        written_bytes = extension.config.num_parameters * source.dtype.itemsize
        with output_directory(output, written_bytes, None) as temporary:
            write_extended(
                temporary,
                source,
                extension,
                max_shard_size_bytes=parse_size(config.max_shard_size),
                report=display.phase("writing", written_bytes),
            )
            write_report(temporary, values, report_markdown(values))
    _print_summary(values, output)


def _learn(
    config: ExtendConfig, source: ModelConversion, tokenizer: Tokenizer, display: BytesDisplay
) -> tuple[Extension, Sequence[Piece]]:
    """The new tokens, and the texts that they were not learned from."""
    vocabulary = read_vocabulary(tokenizer)
    corpus, held_out = find_corpus(config.corpus), HeldOut(config.held_out_bytes)
    pieces = held_out.rest(corpus.pieces(display.phase("learning", corpus.size_bytes)))
    new = learn_merges((piece.text for piece in pieces), tokenizer, vocabulary, config.add_tokens)
    return plan_extension(vocabulary, new, source.config, tokenizer, config.pad_to_multiple_of), held_out.pieces


def _measure(
    config: ExtendConfig,
    source: ModelConversion,
    tokenizer: Tokenizer,
    extension: Extension,
    held_out: Sequence[Piece],
    display: BytesDisplay,
) -> dict[str, Any]:
    """The contents of report.json."""
    kept = _kept_pieces(config)
    model = None
    if held_out or kept:
        device = find_device(config.device)
        model = load(config.model_name_or_path, dtype=config.dtype, device=device).model
    num_bytes = sum(len(piece.text.encode()) for piece in (*held_out, *kept))
    report = display.phase("measuring", 2 * num_bytes)
    texts = (measure_extension(pieces, model, tokenizer, extension, report) for pieces in (held_out, kept))
    return report_values(config.model_name_or_path, source.config, tokenizer, extension, *texts)


def _kept_pieces(config: ExtendConfig) -> Sequence[Piece]:
    """Up to held_out_bytes of each kept language."""
    if config.kept_languages_from is None or not config.held_out_bytes:
        return []
    return first_pieces(find_corpus((), config.kept_languages_from), config.held_out_bytes)


def _print_summary(values: dict[str, Any], output: Path) -> None:
    console = Console(highlight=False, markup=False)
    before, after = values["before"], values["after"]
    rows = Table("", "before", "after")
    for column in rows.columns[1:]:
        column.justify = "right"
    for name in before:
        rows.add_row(name, f"{before[name]:,}", f"{after[name]:,}")
    for kind in ("new", "kept"):
        fits = values[kind]["fits"]["all"] if values[kind] is not None else None
        for name in ("tokens_per_word", "bits_per_byte"):
            if fits is not None and fits["before"]["bytes"]:
                shown = [number(fits[when][name]) for when in ("before", "after")]
                rows.add_row(f"{name.replace('_', ' ')}, {kind} text", *shown)
    console.print(rows)
    if values["kept"] is not None:
        console.print(f"kept languages: {change_line(values['kept'])}", soft_wrap=True)
    console.print(
        f"{values['source']} with {len(values['new_tokens']):,} new tokens is in {output}; their rows are means of "
        "what they replace, and have to be trained",
        soft_wrap=True,
    )
    console.print(f"report: {output / 'report.md'}", soft_wrap=True)
    console.print(
        f"next: bloomlm finetune --model_name_or_path {output} --lora --train_new_tokens --train_file ... "
        "--output_dir ...",
        soft_wrap=True,
    )


command = config_command(
    "extend",
    ExtendConfig,
    extend,
    help="""Add tokens to a model's vocabulary, for a language that it writes in many small pieces.

    New merges are learned from the corpus and act after all old ones: a text in which none of them acts keeps its
    tokens. The new rows of the embedding are means of the rows that they replace; train them with
    `bloomlm finetune --lora --train_new_tokens`. report.md tells tokens per word and bits per byte before and after.

    \b
    bloomlm extend --model_name_or_path builtin:tiny --corpus builtin:dates --add_tokens 100 --output_path tiny-extended
    """,
)
