"""`bloomlm convert`: writes a model or an adapter in another program's files, without changing its numbers."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from bloomlm.api import dtype_of
from bloomlm.checkpoint.adapters.convert import convert_adapter, open_adapter_conversion
from bloomlm.checkpoint.adapters.load import find_adapter
from bloomlm.checkpoint.convert import convert_model, open_model_conversion
from bloomlm.checkpoint.formats import FileForm, find_model
from bloomlm.checkpoint.output import WritesItself
from bloomlm.checkpoint.paddle.importer import ForeignReading
from bloomlm.checkpoint.source import resolve_source
from bloomlm.checkpoint.writer import parse_size
from bloomlm.cli.display import BytesDisplay
from bloomlm.cli.options import config_command
from bloomlm.data.gpt2_files import ADDED_TOKENS_FILE, MERGES_FILE, VOCAB_FILE, find_gpt2_files
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.tokenizer_files import SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from bloomlm.errors import ConfigError, format_bytes
from bloomlm.flags import REQUIRED, Dtype, Flags, ModelFlags, PrefixLayoutName, flag, reading_flags, same_flag

PADDLE_TOKENIZER_FILES = (VOCAB_FILE, MERGES_FILE, ADDED_TOKENS_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Flags):
    """The flags of `bloomlm convert`."""

    input: str = flag("files", REQUIRED, "the model or adapter: a directory, builtin:tiny, or a hub name")
    output: str = flag("files", REQUIRED, "directory to write; replaces an older model or adapter there")
    to: Literal["hf", "paddle"] = flag("files", "hf", "hf: transformers' and PEFT's files; paddle: PaddleNLP 2.6's")
    dtype: Dtype | None = flag("files", None, "precision to write  [default: as stored, so that no bit changes]")
    max_shard_size: str | None = flag(
        "files", None, "largest weight file of a model  [default: 5GB with hf, one file with paddle]"
    )
    tensor_parallel_degree: int = flag(
        "files", 1, "with --to paddle: number of ranks to split the weights for, one file each"
    )
    verify: bool = flag("files", False, "read everything back from disk and compare it with the input")
    base_model_name_or_path: str | None = flag(
        "adapters",
        None,
        "base model, to check the adapter against and to name in PEFT's files; its weights are not read",
    )
    prefix_layout: PrefixLayoutName | None = same_flag(ModelFlags, "prefix_layout", section="adapters")
    trained_tensor_parallel_degree: int | None = same_flag(
        ModelFlags, "trained_tensor_parallel_degree", section="adapters"
    )
    paddle_tokenization: bool = same_flag(ModelFlags, "paddle_tokenization", section="tokenizer")


def convert(config: ConvertConfig) -> None:
    """Run `bloomlm convert`.

    Raises:
        ConfigError: flags that contradict each other, or do not apply to the input.
        CheckpointError: files that cannot be read or written; AdapterError: files of an adapter.
    """
    directory, output = resolve_source(config.input).directory, Path(config.output)
    _check_apart(directory, output)
    is_adapter, is_model = find_adapter(directory), find_model(directory)
    if is_adapter and is_model:
        raise ConfigError(f"{config.input} holds a model and an adapter; move one of them into another directory")
    tokenizer = _find_tokenizer(directory, config)
    messages = Console(stderr=True, highlight=False, markup=False)
    started = time.perf_counter()
    if is_adapter:
        what, flag = _convert_adapter(config, directory, output, tokenizer)
    else:
        what, flag = _convert_model(config, directory, output, tokenizer, messages)
        if tokenizer is None:
            messages.print(f"{config.input} holds no tokenizer, so {output} has none; copy one there", soft_wrap=True)
    _print_report(config, what, flag, time.perf_counter() - started)


def _convert_model(
    config: ConvertConfig, directory: Path, output: Path, tokenizer: WritesItself | None, messages: Console
) -> tuple[str, str]:
    """Return a description of the result, and the flag with which it is loaded."""
    for name in ("base_model_name_or_path", "prefix_layout", "trained_tensor_parallel_degree"):
        if getattr(config, name) is not None:
            raise ConfigError(f"--{name} is for adapters, and {config.input} is a model; leave it out")
    conversion = open_model_conversion(
        directory,
        FileForm(config.to),
        dtype=dtype_of(config.dtype),
        tensor_parallel_degree=config.tensor_parallel_degree,
        max_shard_size_bytes=None if config.max_shard_size is None else parse_size(config.max_shard_size),
    )
    with BytesDisplay(messages) as display:
        convert_model(
            conversion,
            output,
            tokenizer=tokenizer,
            verify=config.verify,
            report=display.phase("writing", conversion.written_bytes),
            report_verified=display.phase("verifying", conversion.verified_bytes),
        )
    dtype = str(conversion.dtype).removeprefix("torch.")
    return f"model of {conversion.config.num_parameters:,} parameters, {dtype}", "model_name_or_path"


def _convert_adapter(
    config: ConvertConfig, directory: Path, output: Path, tokenizer: WritesItself | None
) -> tuple[str, str]:
    """Return a description of the result, and the flag with which it is loaded."""
    if config.max_shard_size is not None:
        raise ConfigError(f"--max_shard_size is for models, and {config.input} is an adapter; leave it out")
    conversion = open_adapter_conversion(
        directory,
        FileForm(config.to),
        dtype=dtype_of(config.dtype),
        tensor_parallel_degree=config.tensor_parallel_degree,
        base_model_name_or_path=config.base_model_name_or_path,
        reading=ForeignReading.from_flags(**reading_flags(config)),
    )
    convert_adapter(conversion, output, tokenizer=tokenizer, verify=config.verify)
    adapter = conversion.adapter.config
    return adapter.describe(), adapter.path_flag


def _check_apart(directory: Path, output: Path) -> None:
    one, other = directory.resolve(), output.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ConfigError(f"--output {output} and the input, {directory}, overlap; name another directory")


class _PaddleTokenizer:
    """Saves a tokenizer in PaddleNLP's files, too."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def save(self, directory: Path) -> None:
        """Write the files."""
        self._tokenizer.save_with_gpt2_files(directory)


class _PaddleTokenizerFiles:
    """Copies PaddleNLP's tokenizer files unchanged."""

    def __init__(self, source: Path) -> None:
        self._source = source

    def save(self, directory: Path) -> None:
        """Copy the files that exist."""
        for name in PADDLE_TOKENIZER_FILES:
            if (self._source / name).is_file():
                shutil.copyfile(self._source / name, directory / name)


def _find_tokenizer(directory: Path, config: ConvertConfig) -> WritesItself | None:
    """The tokenizer of the directory, which saves itself in the form of --to; None where there is none."""
    is_paddle = find_gpt2_files(directory) and not (directory / TOKENIZER_FILE).is_file()
    if config.paddle_tokenization and not (is_paddle and config.to == "hf"):
        raise ConfigError(
            "--paddle_tokenization makes tokenizer.json out of vocab.json and merges.txt; with --to "
            f"{config.to} of {config.input} there is none to make; leave it out"
        )
    if is_paddle and config.to == "paddle":
        return _PaddleTokenizerFiles(directory)
    if not (is_paddle or (directory / TOKENIZER_FILE).is_file()):
        return None
    tokenizer = Tokenizer.from_directory(directory, as_gpt2=config.paddle_tokenization)
    return _PaddleTokenizer(tokenizer) if config.to == "paddle" else tokenizer


def _print_report(config: ConvertConfig, what: str, flag: str, seconds: float) -> None:
    sizes = [path.stat().st_size for path in Path(config.output).iterdir()]
    verified = ", read back and found equal" if config.verify else ""
    lines = [
        f"{config.input} is in {config.output}: {what}",
        f"{len(sizes)} files, {format_bytes(sum(sizes))} in {seconds:.1f} s "
        f"({format_bytes(sum(sizes) / seconds)}/s){verified}",
    ]
    if flag == "model_name_or_path":
        lines.append(f"next: bloomlm predict --model_name_or_path {config.output} --prompt ...")
    else:
        layout = " --prefix_layout new" if flag == "prefix_path" and config.to == "paddle" else ""
        lines.append(f"next: bloomlm predict --model_name_or_path BASE --{flag} {config.output}{layout} --prompt ...")
    console = Console(highlight=False, markup=False)
    for line in lines:
        console.print(line, soft_wrap=True)


command = config_command(
    "convert",
    ConvertConfig,
    convert,
    help="""Convert a model or an adapter from PaddleNLP's files to those of transformers and PEFT, or back.

    The input is anything that bloomlm reads: safetensors or .bin; PaddleNLP's .pdparams, whole, in shards or one for
    each tensor-parallel rank; auto_dist files; an exported .pdiparams; PEFT's adapters, and PaddleNLP's of every year.
    Paddle is not needed, nor is the base model of an adapter.

    Without --dtype no bit of a number changes. One tensor at a time is in memory. The output appears only when it is
    complete; after an interruption, start the same command again.

    \b
    bloomlm convert --input checkpoints/paddle --output checkpoints/hf
    bloomlm convert --input bigscience/bloom-560m --output paddle --to paddle --tensor_parallel_degree 2
    bloomlm convert --input lora_from_2023 --output lora --verify
    """,
)
