"""`bloomlm predict`: complete prompts with a BLOOM, with or without an adapter."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomlm.api import Completion, LoadedModel, load
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.source import resolve_source
from bloomlm.cli.options import config_command
from bloomlm.cli.predict_output import CompletionPrinter, ResultFile, TokenPrinter
from bloomlm.cli.predict_prompts import Prompts, read_prompts
from bloomlm.errors import ConfigError
from bloomlm.generation.config import GenerationConfig

_LOG = logging.getLogger(__name__)
# Handed to GenerationConfig as they are; None: not given.
_DECODING_FLAGS = (
    *("max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "num_beams", "length_penalty"),
)
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def _about(section: str, help: str, **more: Any) -> dict[str, Any]:
    return {"section": section, "help": help, **more}


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """The flags of `bloomlm predict`."""

    model_name_or_path: str = field(
        metadata=_about("model", "builtin:tiny, a directory, or a hub name such as bigscience/bloom-560m")
    )
    lora_path: str | None = field(
        default=None, metadata=_about("model", "directory or hub name of a LoRA adapter (PEFT's or PaddleNLP's files)")
    )
    prefix_path: str | None = field(
        default=None,
        metadata=_about("model", "directory or hub name of a prefix adapter (PEFT's or PaddleNLP's files)"),
    )
    prefix_layout: Literal["old", "new"] | None = field(
        default=None, metadata=_about("model", "of a prefix in PaddleNLP's files: old to August 2023, new after it")
    )
    trained_tensor_parallel_degree: int | None = field(
        default=None,
        metadata=_about("model", "ranks that trained an adapter in PaddleNLP's files, where they do not tell"),
    )
    paddle_tokenization: bool = field(
        default=False,
        metadata=_about("model", "with vocab.json and merges.txt: cut words as PaddleNLP did, not as BLOOM"),
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata=_about("model", "precision of the weights; by default that of the files")
    )
    device: str | None = field(
        default=None, metadata=_about("model", "cpu, gpu, cuda:1, ...; by default a GPU if there is one")
    )
    save_onepiece_model_path: Path | None = field(
        default=None, metadata=_about("model", "write the model, its LoRA adapter merged in, into this directory")
    )

    prompt: tuple[str, ...] = field(
        default=(), metadata=_about("prompts", "a text to continue; repeat the flag for more", repeatable=True)
    )
    data_file: str | None = field(
        default=None,
        metadata=_about(
            "prompts", ".txt (a prompt on each line), .jsonl, .json or .csv (rows as in training), or builtin:dates"
        ),
    )
    prompt_template: str | None = field(
        default=None,
        metadata=_about("prompts", "makes the prompt of each row, e.g. '{instruction}\\n{input}\\nAnswer:'"),
    )
    src_length: int = field(
        default=200, metadata=_about("prompts", "most tokens of a prompt; the end of a longer one is dropped")
    )

    output_file: Path | None = field(
        default=None,
        metadata=_about(
            "output", "write JSON lines: prompt, completion, finish_reason, tokens; a stopped run goes on from there"
        ),
    )
    stream: bool = field(
        default=False, metadata=_about("output", "show each completion while it comes, one prompt after another")
    )

    decode_strategy: Literal["greedy", "sampling", "beam_search"] = field(
        default="greedy", metadata=_about("decoding", "how the next token is chosen")
    )
    max_new_tokens: int = field(
        default=200,
        metadata=_about("decoding", "most tokens to generate, </s> included", aliases=("tgt_length",)),
    )
    min_new_tokens: int | None = field(default=None, metadata=_about("decoding", "tokens before </s> is allowed"))
    stop: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            "decoding", r"a text that ends a completion (\n: line end); repeat the flag for more", repeatable=True
        ),
    )
    repetition_penalty: float | None = field(
        default=None, metadata=_about("decoding", "above 1.0 makes tokens that occurred less likely (1.0: off)")
    )
    no_repeat_ngram_size: int | None = field(
        default=None, metadata=_about("decoding", "no run of this many tokens occurs twice (0: off)")
    )
    num_return_sequences: int | None = field(
        default=None, metadata=_about("decoding", "completions of each prompt: samples or beams")
    )
    temperature: float | None = field(
        default=None, metadata=_about("sampling", "below 1.0 plays safe, above 1.0 takes risks [default: 1.0]")
    )
    top_k: int | None = field(
        default=None, metadata=_about("sampling", "draw from the k most likely tokens (0: all) [default: 0]")
    )
    top_p: float | None = field(
        default=None,
        metadata=_about("sampling", "draw from the most likely tokens that add up to this probability [default: 1.0]"),
    )
    seed: int | None = field(default=None, metadata=_about("sampling", "start of the random numbers [default: 20]"))
    num_beams: int | None = field(
        default=None, metadata=_about("beam search", "continuations followed at once [default: 4]")
    )
    length_penalty: float | None = field(
        default=None,
        metadata=_about(
            "beam search", "score = log-probability / length ** this; above 0 favours long ones [default: 1.0]"
        ),
    )

    batch_size: int = field(
        default=2, metadata=_about("computing", "prompts computed at once; changes the speed, not the results")
    )

    def generation(self) -> GenerationConfig:
        """What to generate and how.

        Raises:
            GenerationError: a value out of range, or a flag without effect under the strategy.
        """
        seed = self.seed
        if seed is not None and self.decode_strategy != "sampling":
            # PaddleNLP's commands give one always.
            _LOG.warning("--seed has no effect with --decode_strategy %s", self.decode_strategy)
            seed = None
        return GenerationConfig.from_options(
            decode_strategy=self.decode_strategy,
            seed=seed,
            stop=[re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text) for text in self.stop],
            **{name: getattr(self, name) for name in _DECODING_FLAGS},
        )


def predict(config: PredictConfig) -> None:
    """Run `bloomlm predict`.

    Raises:
        BloomlmError: flags, files or prompts that cannot be used.
    """
    generation = config.generation()
    if config.stream:
        _check_stream(config, generation)
    if config.save_onepiece_model_path is not None and config.prefix_path is not None:
        raise ConfigError(
            "--save_onepiece_model_path merges an adapter into the weights, which a prefix cannot be: its virtual "
            "tokens are no weights. Keep --prefix_path beside the model"
        )
    prompts = read_prompts(config.prompt, config.data_file, config.prompt_template)
    if prompts is None and config.save_onepiece_model_path is None:
        raise ConfigError(
            "no prompts; give --prompt 'Once upon a time', --data_file prompts.txt (or .jsonl), "
            "or send them through a pipe, one on each line"
        )
    loaded = load(
        config.model_name_or_path,
        lora_path=config.lora_path,
        prefix_path=config.prefix_path,
        prefix_layout=config.prefix_layout,
        trained_tensor_parallel_degree=config.trained_tensor_parallel_degree,
        paddle_tokenization=config.paddle_tokenization,
        dtype=config.dtype,
        device=_device(config.device),
    )
    if config.save_onepiece_model_path is not None:
        _save(config.save_onepiece_model_path, loaded)
    if prompts is not None:
        _predict(config, generation, loaded, prompts)


def _predict(config: PredictConfig, generation: GenerationConfig, loaded: LoadedModel, prompts: Prompts) -> None:
    started = time.perf_counter()
    console, messages = Console(), Console(stderr=True, highlight=False, markup=False)
    printer = CompletionPrinter(console)
    per_prompt = generation.num_return_sequences
    with ExitStack() as stack:
        file = None
        done: list[Completion] = []
        if config.output_file is not None:
            identity = _identity(config, generation, prompts)
            file = stack.enter_context(ResultFile(config.output_file, identity=identity, lines_per_prompt=per_prompt))
            done = file.completions
            if done:
                messages.print(f"{len(done)} completions are there from a run that was stopped; going on after them")
        stream = TokenPrinter(printer, loaded.tokenizer, prompts.texts, generation.stop) if config.stream else None
        coming = loaded.completions(
            prompts.texts,
            generation,
            batch_size=1 if stream else config.batch_size,
            src_length=config.src_length,
            num_done=len(done) // per_prompt,
            on_token=stream.push if stream else None,
        )
        if file is not None and stream is None:
            coming = _with_progress(coming, messages, len(done), len(prompts.texts) * per_prompt)
        num_tokens = 0
        for completion in coming:
            num_tokens += len(completion.tokens)
            if file is not None:
                file.write(completion)
            if stream is not None:
                stream.finish()
            elif file is None:
                printer.show(completion, len(done) % per_prompt + 1 if per_prompt > 1 else None)
            done.append(completion)
        if file is not None:
            file.finish()
    seconds = time.perf_counter() - started
    messages.print(f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / seconds:.1f} tokens/s)", style="dim")
    if config.output_file is not None:
        messages.print(f"{len(done)} completions in {config.output_file}")
    if prompts.targets is not None:
        messages.print(_exact_match(done[::per_prompt], prompts.targets))


def _save(directory: Path, loaded: LoadedModel) -> None:
    merge_to_directory(loaded.model, directory, tokenizer=loaded.tokenizer, max_shard_size_bytes=sys.maxsize)
    Console(stderr=True, highlight=False, markup=False).print(f"the model is in {directory}, its weights in one file")


def _with_progress(
    completions: Iterator[Completion], console: Console, num_done: int, total: int
) -> Iterator[Completion]:
    columns = TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("predicting", total=total, completed=num_done)
        for completion in completions:
            yield completion
            progress.advance(task)


def _exact_match(completions: list[Completion], targets: list[str]) -> str:
    pairs = zip(completions, targets, strict=True)
    num_equal = sum(completion.completion.strip() == target.strip() for completion, target in pairs)
    return f"exact match: {num_equal / len(targets):.1%} ({num_equal} of {len(targets)})"


def _check_stream(config: PredictConfig, generation: GenerationConfig) -> None:
    if config.decode_strategy == "beam_search":
        raise ConfigError("--stream has nothing to show during a beam search; choose greedy or sampling")
    if generation.num_return_sequences > 1:
        raise ConfigError("--stream shows one completion of each prompt; leave out --num_return_sequences or --stream")


def _identity(config: PredictConfig, generation: GenerationConfig, prompts: Prompts) -> str:
    """Everything that decides the completions, the state of the model's files included."""
    files = []
    for name in (config.model_name_or_path, config.lora_path, config.prefix_path):
        directory = None if name is None else resolve_source(name).directory
        if directory is not None:
            stats = [(path.name, path.stat()) for path in sorted(directory.iterdir())]
            files.append([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats])
    reading = (config.prefix_layout, config.trained_tensor_parallel_degree, config.paddle_tokenization)
    return json.dumps([files, reading, config.dtype, config.src_length, asdict(generation), prompts.texts])


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such kind; expected cpu, gpu or cuda:NUMBER") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: PyTorch finds no GPU here; use --device cpu, or a PyTorch built for CUDA")
    return device


command = config_command(
    "predict",
    PredictConfig,
    predict,
    help="""Complete prompts with a BLOOM, with or without an adapter.

    The prompts come from --prompt, from --data_file or, one on each line, through a pipe.
    """,
)
