"""What `bloomlm predict` and `bloomlm infer` share: flags of prompts, decoding and output, and the run they make."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomlm.cli.predict_output import CompletionPrinter, ResultFile, TokenPrinter
from bloomlm.cli.predict_prompts import Prompts, read_prompts
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.flags import Flags, flag
from bloomlm.generation.completion import Completion
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import OnToken

_LOG = logging.getLogger(__name__)
# Handed to GenerationConfig as they are; None: not given.
_DECODING_FLAGS = (
    *("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "num_beams", "length_penalty"),
)
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


class Completer(Protocol):
    """A model or a program, with its tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to ids and back."""
        ...

    def completions(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        *,
        batch_size: int,
        src_length: int | None,
        num_done: int,
        on_token: OnToken | None,
    ) -> Iterator[Completion]:
        """Complete prompts batch by batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompletionFlags(Flags):
    """Prompts, decoding and output."""

    prompt: tuple[str, ...] = flag("prompts", (), "a text to continue; repeat the flag for more", repeatable=True)
    data_file: str | None = flag(
        "prompts", None, ".txt (a prompt on each line), .jsonl, .json or .csv (rows as in training), or builtin:dates"
    )
    prompt_template: str | None = flag(
        "prompts", None, "makes the prompt of each row, e.g. '{instruction}\\n{input}\\nAnswer:'"
    )
    src_length: int = flag("prompts", 200, "most tokens of a prompt; the end of a longer one is dropped")

    output_file: Path | None = flag(
        "output", None, "write JSON lines: prompt, completion, finish_reason, tokens; a stopped run goes on from there"
    )
    stream: bool = flag("output", False, "show each completion while it comes, one prompt after another")

    decode_strategy: Literal["greedy", "sampling", "beam_search"] = flag(
        "decoding", "greedy", "how the next token is chosen"
    )
    min_new_tokens: int | None = flag("decoding", None, "tokens before </s> is allowed")
    stop: tuple[str, ...] = flag(
        "decoding", (), r"a text that ends a completion (\n: line end); repeat the flag for more", repeatable=True
    )
    repetition_penalty: float | None = flag(
        "decoding", None, "above 1.0 makes tokens that occurred less likely (1.0: off)"
    )
    no_repeat_ngram_size: int | None = flag("decoding", None, "no run of this many tokens occurs twice (0: off)")
    num_return_sequences: int | None = flag("decoding", None, "completions of each prompt: samples or beams")
    temperature: float | None = flag("sampling", None, "below 1.0 plays safe, above 1.0 takes risks [default: 1.0]")
    top_k: int | None = flag("sampling", None, "draw from the k most likely tokens (0: all) [default: 0]")
    top_p: float | None = flag(
        "sampling", None, "draw from the most likely tokens that add up to this probability [default: 1.0]"
    )
    seed: int | None = flag("sampling", None, "start of the random numbers [default: 20]")
    num_beams: int | None = flag("beam search", None, "continuations followed at once [default: 4]")
    length_penalty: float | None = flag(
        "beam search", None, "score = log-probability / length ** this; above 0 favours long ones [default: 1.0]"
    )

    batch_size: int = flag("computing", 2, "prompts computed at once; changes the speed, not the results")

    def generation_of(self, max_new_tokens: int) -> GenerationConfig:
        """What to generate and how.

        Args:
            max_new_tokens: as the verb's own flag says.

        Raises:
            GenerationError: a value out of range, or a flag without effect under the strategy.
        """
        seed = self.seed
        if seed is not None and self.decode_strategy != "sampling":
            # the commands that infer_generation.py takes always give one
            _LOG.warning("--seed has no effect with --decode_strategy %s", self.decode_strategy)
            seed = None
        return GenerationConfig.from_options(
            decode_strategy=self.decode_strategy,
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop=[re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text) for text in self.stop],
            **{name: getattr(self, name) for name in _DECODING_FLAGS},
        )


def run_completions(
    config: CompletionFlags,
    generation: GenerationConfig,
    completer: Completer,
    prompts: Prompts,
    *,
    identity: str,
    is_main: bool = True,
    from_main: Callable[[list[Completion]], list[Completion]] = lambda done: done,
) -> None:
    """Complete the prompts; show or write what comes.

    Args:
        config: the flags.
        generation: what they ask for.
        completer: completes.
        prompts: what to complete.
        identity: everything that decides the completions, as text: a stopped run goes on only where it is the same.
        is_main: whether this rank shows and writes; every rank completes.
        from_main: gives every rank the main one's value.

    Raises:
        GenerationError: an empty prompt.
        CheckpointError: the output file cannot be written.
    """
    started = time.perf_counter()
    console = Console(quiet=not is_main)
    messages = Console(stderr=True, highlight=False, markup=False, quiet=not is_main)
    printer = CompletionPrinter(console)
    per_prompt = generation.num_return_sequences
    with ExitStack() as stack:
        file = None
        done: list[Completion] = []
        if config.output_file is not None and is_main:
            file = stack.enter_context(ResultFile(config.output_file, identity=identity, lines_per_prompt=per_prompt))
            done = list(file.completions)
            if done:
                messages.print(f"{len(done)} completions are there from a run that was stopped; going on after them")
        done = from_main(done)
        stream = None
        if config.stream and is_main:
            stream = TokenPrinter(printer, completer.tokenizer, prompts.texts, generation.stop)
        coming = completer.completions(
            prompts.texts,
            generation,
            batch_size=1 if config.stream else config.batch_size,
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
            elif file is None and is_main:
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


def check_completion_flags(config: CompletionFlags, generation: GenerationConfig) -> None:
    """Refuse output flags that do not go with the decoding.

    Raises:
        ConfigError: --stream with a beam search, or with several completions of a prompt.
    """
    if not config.stream:
        return
    if config.decode_strategy == "beam_search":
        raise ConfigError("--stream has nothing to show during a beam search; choose greedy or sampling")
    if generation.num_return_sequences > 1:
        raise ConfigError("--stream shows one completion of each prompt; leave out --num_return_sequences or --stream")


def prompts_of(config: CompletionFlags) -> Prompts | None:
    """The prompts that the flags name, or those of a pipe; None where there are none."""
    return read_prompts(config.prompt, config.data_file, config.prompt_template)


NO_PROMPTS = (
    "no prompts; give --prompt 'Once upon a time', --data_file prompts.txt (or .jsonl), "
    "or send them through a pipe, one on each line"
)


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
