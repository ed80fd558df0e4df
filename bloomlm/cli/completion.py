"""What `bloomlm predict` and `bloomlm infer` share: flags for prompts, decoding and output, and the run itself."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from bloomlm.cli.decoding import DecodingFlags
from bloomlm.cli.display import CompletionPrinter, TokenPrinter
from bloomlm.cli.prompts import PromptFlags, Prompts
from bloomlm.errors import ConfigError
from bloomlm.files.atomic import atomic_write
from bloomlm.files.resumable import ResumableResults
from bloomlm.flags import flag
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.text import Completion

if TYPE_CHECKING:
    from bloomlm.api import LoadedModel
    from bloomlm.runtime.program import Program


@dataclass(frozen=True, kw_only=True)
class CompletionFlags(DecodingFlags, PromptFlags):
    """Prompts, decoding and output."""

    output_file: Path | None = flag(
        "output",
        None,
        "write JSON lines: prompt, completion, finish_reason, tokens; the same command resumes a stopped run",
    )
    stream: bool = flag("output", False, "print each token as soon as it is generated, one prompt after another")

    decode_strategy: Literal["greedy", "sampling", "beam_search"] = flag(
        "decoding", "greedy", "how tokens are chosen: the likeliest, at random, or by following several texts at once"
    )
    num_return_sequences: int | None = flag(
        "decoding", None, "completions of each prompt, with sampling or beams  [default: 1]"
    )
    num_beams: int | None = flag("beam search", None, "texts followed at once  [default: 4]")
    length_penalty: float | None = flag(
        "beam search", None, "score = log-probability / length ** this; a larger one favours long texts  [default: 1]"
    )

    batch_size: int = flag("computing", 2, "prompts computed at once; changes the speed, not the results")
    prompt_lookup: int = flag(
        "computing",
        0,
        "tokens to guess where a greedy completion repeats its text; changes the speed, not the results",
    )

    def generation_of(self, max_new_tokens: int) -> GenerationConfig:
        """How to complete the prompts.

        Args:
            max_new_tokens: the value of that flag, which each verb declares with its own default.

        Raises:
            GenerationError: a value out of range, or a flag without effect under the strategy.
            ConfigError: --stream with a beam search, or with several completions of a prompt.
        """
        if self.stream and self.decode_strategy == "beam_search":
            raise ConfigError("--stream has nothing to show during a beam search; choose greedy or sampling")
        if self.stream and (self.num_return_sequences or 1) > 1:
            raise ConfigError("--stream shows one completion of each prompt; leave out --num_return_sequences")
        return self.generation_with(
            decode_strategy=self.decode_strategy,
            max_new_tokens=max_new_tokens,
            num_return_sequences=self.num_return_sequences,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
        )


class ResultFile(ResumableResults):
    """A JSONL file of completions that appears when it is complete; a stopped run resumes after its last whole prompt.

    Args:
        path: the file to write; an existing one is replaced at the end.
        identity: everything that decides the completions, as text.
        lines_per_prompt: completions of each prompt.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, *, identity: str, lines_per_prompt: int) -> None:
        super().__init__(path, identity=identity)
        self.path = path
        found: list[Completion] = []
        with suppress(KeyError, TypeError):
            while len(found) < len(self.done):
                found.append(Completion(**self.done[len(found)]))
        self.completions = found[: len(found) // lines_per_prompt * lines_per_prompt]
        """The completions so far; the first ones may come from a stopped run."""

    def write(self, completion: Completion) -> None:
        """Add one completion, and flush it to the file of unfinished results."""
        self.add({len(self.completions): asdict(completion)})
        self.completions.append(completion)

    def finish(self) -> None:
        """Put the complete file in its place."""
        lines = (json.dumps(asdict(completion), ensure_ascii=False) for completion in self.completions)
        atomic_write(self.path, "".join(line + "\n" for line in lines))
        self.remove(of_all_runs=True)


def run_completions(
    config: CompletionFlags,
    generation: GenerationConfig,
    completer: "LoadedModel | Program",
    prompts: Prompts,
    *,
    identity: str,
    is_main: bool = True,
    from_main: Callable[[list[Completion]], list[Completion]] = lambda done: done,
) -> None:
    """Complete the prompts, and show the completions or write them to a file; every rank makes this call.

    Args:
        config, generation: the flags, and what they say about decoding.
        completer: a model or a program.
        prompts: the texts, and the right answers if they are known.
        identity: everything that decides the completions, as text; a stopped run is resumed only if it is the same.
        is_main: whether this rank prints and writes.
        from_main: returns the value of the main rank on every rank.

    Raises:
        GenerationError: an empty prompt.
        CheckpointError: the output file cannot be written.
    """
    started = time.perf_counter()
    messages = Console(stderr=True, highlight=False, markup=False, quiet=not is_main)
    printer = CompletionPrinter(Console())
    per_prompt = generation.num_return_sequences
    path = config.output_file if is_main else None
    with nullcontext() if path is None else ResultFile(path, identity=identity, lines_per_prompt=per_prompt) as file:
        done = from_main([] if file is None else list(file.completions))
        num_before = len(done)
        if num_before:
            messages.print(f"{num_before} completions are there from a stopped run; going on after them")
        stream = None
        if config.stream and is_main:
            stream = TokenPrinter(printer, completer.tokenizer, prompts.texts, generation)
        bar = messages if messages.is_terminal and file is not None and stream is None else None
        for completion in _completions(config, generation, completer, prompts, num_before, stream, bar):
            if file is not None:
                file.write(completion)
            if stream is not None:
                stream.finish()
            elif file is None and is_main:
                printer.show(completion, len(done) % per_prompt + 1 if per_prompt > 1 else None)
            done.append(completion)
        if file is not None:
            file.finish()
    _report(messages, config, prompts, done, num_before, time.perf_counter() - started)


def _completions(
    config: CompletionFlags,
    generation: GenerationConfig,
    completer: "LoadedModel | Program",
    prompts: Prompts,
    num_before: int,
    stream: TokenPrinter | None,
    bar_console: Console | None,
) -> Iterator[Completion]:
    """The completions after the first num_before, with a progress bar where there is a console for it."""
    coming = completer.completions(
        prompts.texts,
        generation,
        batch_size=1 if config.stream else config.batch_size,
        src_length=config.most_prompt_tokens,
        prompt_lookup=config.prompt_lookup,
        num_done=num_before // generation.num_return_sequences,
        on_token=stream.push if stream else None,
    )
    if bar_console is None:
        yield from coming
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=bar_console) as progress:
        total = len(prompts.texts) * generation.num_return_sequences
        task = progress.add_task("predicting", total=total, completed=num_before)
        for completion in coming:
            yield completion
            progress.advance(task)


def _report(
    console: Console,
    config: CompletionFlags,
    prompts: Prompts,
    completions: Sequence[Completion],
    num_before: int,
    seconds: float,
) -> None:
    """Print the speed, the output file, and the share of right answers."""
    num_tokens = sum(len(completion.tokens) for completion in completions[num_before:])
    console.print(f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / seconds:.1f} tokens/s)", style="dim")
    if config.output_file is not None:
        console.print(f"{len(completions)} completions in {config.output_file}")
    if prompts.targets is not None:
        per_prompt = len(completions) // len(prompts.texts)
        pairs = zip(completions[::per_prompt], prompts.targets, strict=True)
        num_equal = sum(completion.completion.strip() == target.strip() for completion, target in pairs)
        console.print(f"exact match: {num_equal / len(prompts.targets):.1%} ({num_equal} of {len(prompts.targets)})")
