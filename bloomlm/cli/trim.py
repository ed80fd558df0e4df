"""`bloomlm trim`: a vocabulary of the size that a corpus needs, and the way back."""

from collections.abc import Callable
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
from bloomlm.data.corpus import Corpus, Piece, find_corpus
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError, format_bytes
from bloomlm.flags import REQUIRED, DeviceFlags, Dtype, Flags, ModelFlags, flag, same_flag
from bloomlm.parallel.launch import find_device
from bloomlm.vocabulary.effects import measure_trimmed, measure_whole
from bloomlm.vocabulary.held_out import HeldOut, first_pieces
from bloomlm.vocabulary.report import number, write_report
from bloomlm.vocabulary.selection import Ids, count_tokens, rank_tokens, read_vocabulary, select_tokens
from bloomlm.vocabulary.trim import (
    Trim,
    check_fingerprint,
    plan_trim,
    restored_config,
    source_fingerprint,
    write_restored,
    write_trimmed,
)
from bloomlm.vocabulary.trim_report import NO_HELD_OUT, greedy_line, report_markdown, report_values, write_picture

DEFAULT_COVERAGE = 0.9999
NUM_LANGUAGES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class TrimConfig(Flags):
    """The flags of `bloomlm trim`."""

    model_name_or_path: str = same_flag(ModelFlags, "model_name_or_path")
    corpus: tuple[str, ...] = flag(
        "corpus",
        (),
        "files or directories in the languages to keep (.txt, .jsonl, .json, .csv, .parquet), or builtin:dates",
    )
    languages_from: str | None = flag(
        "corpus", None, "directory with one file or subdirectory of such texts for each language"
    )
    held_out: tuple[str, ...] = flag(
        "corpus", (), "texts to measure, files or directories as --languages_from  [default: a sixteenth of the corpus]"
    )
    held_out_bytes: int = flag(
        "corpus", 2**16, "bytes of each language to measure; 0: measure nothing, load no model", minimum=0
    )
    keep_tokens: int | None = flag("size", None, "tokens to keep in all", minimum=1)
    coverage: float | None = flag(
        "size",
        None,
        f"share of the token occurrences of every language to keep  [default: {DEFAULT_COVERAGE}]",
        above=0,
        maximum=1,
    )
    pad_to_multiple_of: int = flag("size", 1, "number of rows to round up to, for tensor parallelism", minimum=1)
    sweep: tuple[str, ...] = flag("size", (), "other numbers of tokens to measure, without writing a model")
    output_path: str = flag("output", REQUIRED, "directory to write; replaces an older model there")
    max_shard_size: str = flag("output", "5GB", "largest weight file; a larger model is split into several")
    restore: str | None = flag(
        "output", None, "a trimmed model, trained or not, that gets all tokens of --model_name_or_path again"
    )
    dtype: Dtype = flag(
        "measuring", "float32", "precision to measure in; the written files keep the precision of the model"
    )
    device: str | None = same_flag(DeviceFlags, "device", section="measuring")


def trim(config: TrimConfig) -> None:
    """Run `bloomlm trim`.

    Raises:
        ConfigError: flags that do not go together, or a size that cannot be.
        DataError: a corpus that cannot be read.
        CheckpointError: files cannot be read or written.
    """
    output = Path(config.output_path)
    if output.resolve() in {Path(name).resolve() for name in (config.model_name_or_path, config.restore) if name}:
        raise ConfigError(f"--output_path {output} is one of the models to read; name another directory")
    check_replaceable(output)
    directory = resolve_source(config.model_name_or_path).directory
    source = open_model_conversion(directory, FileForm.HUGGING_FACE)
    tokenizer = Tokenizer.from_directory(directory)
    with BytesDisplay(Console(stderr=True)) as display:
        if config.restore is not None:
            _restore(config, config.restore, source, tokenizer, output, display)
            return
        values = _trim(config, source, tokenizer, output, display)
    _print_summary(values, output)


def _trim(
    config: TrimConfig, source: ModelConversion, tokenizer: Tokenizer, output: Path, display: BytesDisplay
) -> dict[str, Any]:
    """Count, choose, measure and write; the contents of report.json."""
    plan = _planner(config, source, tokenizer)
    counts, held_out = _read_corpus(config, tokenizer, source.config.vocab_size, display)
    ranks = rank_tokens(list(counts.values()))
    trim = plan(ranks, config.keep_tokens)
    others = [plan(ranks, num_tokens) for num_tokens in _sweep_sizes(config)]
    model = None
    if held_out:
        device = find_device(config.device)
        model = load(config.model_name_or_path, dtype=config.dtype, device=device).model
    num_bytes = sum(len(piece.text.encode()) for piece in held_out) if model else 0
    report = display.phase("measuring", num_bytes * (2 + len(others)))
    whole = measure_whole(model, tokenizer, held_out, report)
    effects = measure_trimmed(whole, trim, report)
    sweep = [(other, measure_trimmed(whole, other, report)) for other in others]
    if sweep:
        sweep = sorted([*sweep, (trim, effects)], key=lambda row: len(row[0].kept))
    del model
    values = report_values(
        config.model_name_or_path, source.config, source.dtype, whole, counts, (trim, effects), sweep
    )
    written_bytes = trim.config.num_parameters * source.dtype.itemsize
    with output_directory(output, written_bytes, None) as temporary:
        write_trimmed(
            temporary,
            source,
            trim,
            source_name=config.model_name_or_path,
            fingerprint=source_fingerprint(source, tokenizer),
            max_shard_size_bytes=parse_size(config.max_shard_size),
            report=display.phase("writing", written_bytes),
        )
        write_report(temporary, values, report_markdown(values))
        write_picture(temporary, values)
    return values


def _planner(config: TrimConfig, source: ModelConversion, tokenizer: Tokenizer) -> Callable[[Any, int | None], Trim]:
    """Plans a trim from ranks and a number of tokens; checks the flags that need no corpus."""
    if config.keep_tokens is not None and config.coverage is not None:
        raise ConfigError("--keep_tokens and --coverage both say how much to keep; give one of them")
    own = source.config
    vocabulary = read_vocabulary(tokenizer, (own.unk_token_id, own.bos_token_id, own.eos_token_id, own.pad_token_id))
    if vocabulary.num_ids > own.vocab_size:
        raise ConfigError(
            f"{config.model_name_or_path}: its tokenizer has ids up to {vocabulary.num_ids - 1}, its embedding "
            f"{own.vocab_size} rows; they belong to different models"
        )
    coverage = DEFAULT_COVERAGE if config.coverage is None else config.coverage

    def plan(ranks: Any, num_tokens: int | None) -> Trim:
        kept = select_tokens(vocabulary, ranks, num_tokens=num_tokens, coverage=coverage)
        return plan_trim(vocabulary, kept, own, tokenizer, config.pad_to_multiple_of)

    return plan


def _sweep_sizes(config: TrimConfig) -> list[int]:
    try:
        return sorted(int(text) for text in config.sweep)
    except ValueError as error:
        raise ConfigError(
            f"--sweep {','.join(config.sweep)}: expected numbers of tokens, such as 16000,46145"
        ) from error


def _read_corpus(
    config: TrimConfig, tokenizer: Tokenizer, num_ids: int, display: BytesDisplay
) -> tuple[dict[str, Ids], list[Piece]]:
    """How often each token occurs, by language, and the held-out texts."""
    if not config.corpus and config.languages_from is None:
        raise ConfigError("give texts of the languages to keep: --corpus FILES, or --languages_from DIRECTORY")
    corpus = find_corpus(config.corpus, config.languages_from)
    taken = HeldOut(0 if config.held_out else config.held_out_bytes)
    pieces = corpus.pieces(display.phase("reading", corpus.size_bytes))
    counts = count_tokens(taken.rest(pieces), tokenizer, num_ids)
    if not counts:
        raise DataError("the corpus holds no text")
    held_out = taken.pieces
    if config.held_out and config.held_out_bytes:
        named = [find_corpus((), name) if Path(name).is_dir() else find_corpus([name]) for name in config.held_out]
        files = tuple(file for found in named for file in found.files)
        held_out = first_pieces(Corpus(files=files), config.held_out_bytes)
    return counts, held_out


def _restore(
    config: TrimConfig,
    trimmed_name: str,
    source: ModelConversion,
    tokenizer: Tokenizer,
    output: Path,
    display: BytesDisplay,
) -> None:
    for name in ("corpus", "languages_from", "held_out", "keep_tokens", "coverage", "sweep"):
        if getattr(config, name):
            raise ConfigError(f"--{name} is for trimming, and --restore undoes it; leave it out")
    directory = resolve_source(trimmed_name).directory
    trimmed = open_model_conversion(directory, FileForm.HUGGING_FACE)
    whole = restored_config(trimmed.config, source.config)
    check_fingerprint(directory, source_fingerprint(source, tokenizer))
    written_bytes = whole.num_parameters * trimmed.dtype.itemsize
    with output_directory(output, written_bytes, None) as temporary:
        write_restored(
            temporary,
            trimmed,
            source,
            (Tokenizer.from_directory(directory), tokenizer),
            max_shard_size_bytes=parse_size(config.max_shard_size),
            report=display.phase("writing", written_bytes),
        )
    console = Console(highlight=False, markup=False)
    console.print(
        f"{trimmed_name} is in {output}, with the {whole.vocab_size:,} rows of {config.model_name_or_path}",
        soft_wrap=True,
    )


def _print_summary(values: dict[str, Any], output: Path) -> None:
    console = Console(highlight=False, markup=False)
    before, after = values["before"], values["after"]
    table = Table("", "before", "after")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("tokens", "rows", "parameters"):
        table.add_row(name, f"{before[name]:,}", f"{after[name]:,}")
    table.add_row("size of the weights", format_bytes(before["bytes"]), format_bytes(after["bytes"]))
    console.print(table)
    if values["held_out"]["all"]["before"]["bytes"]:
        console.print(_fit_table(values["held_out"]))
    else:
        console.print(NO_HELD_OUT, soft_wrap=True)
    console.print(greedy_line(values["greedy"]), soft_wrap=True)
    console.print(f"{values['source']} with {after['tokens']:,} tokens is in {output}", soft_wrap=True)
    console.print(f"report: {output / 'report.md'}", soft_wrap=True)
    console.print(f"next: bloomlm predict --model_name_or_path {output} --prompt ...", soft_wrap=True)


def _fit_table(held_out: dict[str, Any]) -> Table:
    """The whole held-out text, and the languages that the trim costs most."""
    table = Table("held-out text", "tokens per word", "after", "bits per byte", "after", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    languages = sorted(held_out.keys() - {"all"}, key=lambda name: _change(held_out[name]), reverse=True)
    for name in [*languages[:NUM_LANGUAGES_SHOWN], "all"]:
        old, new = held_out[name]["before"], held_out[name]["after"]
        words = [f"{fit['tokens_per_word']:.3f}" for fit in (old, new)]
        bits = [number(fit["bits_per_byte"]) for fit in (old, new)]
        table.add_row(name, *words, *bits, f"{_change(held_out[name]) - 1:+.2%}")
    if more := languages[NUM_LANGUAGES_SHOWN:]:
        table.caption = f"{len(more)} more languages, which it costs less, are in the report"
    return table


def _change(fits: dict[str, Any]) -> float:
    """By how much a figure gets worse; of tokens where bits are not known."""
    name = "tokens_per_word" if fits["before"]["bits_per_byte"] is None else "bits_per_byte"
    return float(fits["after"][name] / max(fits["before"][name], 1e-9))


command = config_command(
    "trim",
    TrimConfig,
    trim,
    help="""Cut a model's vocabulary to what the texts of your languages use; rows of other tokens are dropped.

    Special tokens, all bytes and the parts of every kept token stay, so that any text can still be written, and a text
    whose tokens are all kept has the same tokens, the same logits and the same greedy continuation as before, as long
    as no removed token would have won. report.md tells what it costs. LoRA and prefix adapters of the whole model fit
    the trimmed one.

    \b
    bloomlm trim --model_name_or_path builtin:tiny --corpus builtin:dates --output_path tiny-dates
    bloomlm trim --model_name_or_path builtin:tiny --corpus builtin:dates --keep_tokens 900 --sweep 600,1200 \\
        --output_path tiny-900
    bloomlm trim --restore tiny-900 --model_name_or_path builtin:tiny --output_path tiny-again
    """,
)
