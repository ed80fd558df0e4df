"""What verbs print while they work: the bytes that are done and their rate, and completions."""

import re
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import format_bytes
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.text import Completion
from bloomlm.serving.text_stream import TextStream

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 2.0
"""Shortest time between two lines where there is no terminal."""
NUM_LINES = 10
# Control characters that could steer a terminal; line ends and tabs may stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class BytesDisplay:
    """A progress bar for each phase of the work on a terminal, up to ten lines each anywhere else.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> "BytesDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, total_bytes: int) -> Callable[[int], None]:
        """Add a phase, which is shown once its first bytes are done.

        Args:
            name: what the phase does, e.g. "writing".
            total_bytes: size of the whole phase.

        Returns:
            A function to call with the number of bytes that have been done since the last call.
        """
        return _Phase(self._console, self._progress, name, total_bytes).advance


class _Phase:
    def __init__(self, console: Console, progress: "Progress", name: str, total_bytes: int) -> None:
        self._console, self._progress = console, progress
        self._name, self._total_bytes = name, total_bytes
        self._task = progress.add_task(name, total=total_bytes, visible=False, start=False)
        self._done_bytes = self._num_lines = 0
        self._start = self._last_line = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        if not self._done_bytes:
            self._start = self._last_line = time.monotonic()
            self._progress.start_task(self._task)
        self._done_bytes += num_bytes
        self._progress.update(self._task, completed=self._done_bytes, visible=True)
        if not self._console.is_terminal:
            self._print_when_due()

    def _print_when_due(self) -> None:
        now = time.monotonic()
        is_next = self._done_bytes * NUM_LINES >= self._total_bytes * (self._num_lines + 1)
        is_done = self._done_bytes >= self._total_bytes
        if not (is_done or (is_next and now - self._last_line >= LINE_SECONDS)):
            return
        self._num_lines = self._done_bytes * NUM_LINES // max(self._total_bytes, 1)
        self._last_line = now
        rate = self._done_bytes / max(now - self._start, 1e-3)
        self._console.print(
            f"{self._name} {format_bytes(self._done_bytes)} of {format_bytes(self._total_bytes)} "
            f"({self._done_bytes / max(self._total_bytes, 1):.0%})  {format_bytes(rate)}/s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


class CompletionPrinter:
    """Prints completions, each under its prompt: whole, or token by token.

    A terminal gets colours and no control characters; a pipe or a file gets the texts exactly as they are.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, completion: Completion, number: int | None) -> None:
        """Print a whole completion.

        Args:
            completion: the completion.
            number: its number among the completions of its prompt, from 1; None where there is only one.
        """
        if number is None or number == 1:
            self.prompt(completion.prompt)
        self.piece(completion.completion if number is None else f"[{number}] {completion.completion}")
        self.end()

    def prompt(self, text: str) -> None:
        """Print a prompt and a line end."""
        self._write(text + "\n", "cyan")

    def piece(self, text: str) -> None:
        """Print a part of a completion immediately."""
        self._write(text, "bold")

    def end(self) -> None:
        """End a completion."""
        self._write("\n\n" if self._console.is_terminal else "\n", "")

    def _write(self, text: str, style: str) -> None:
        if self._console.is_terminal:
            self._console.print(Text(_CONTROL.sub("\ufffd", text), style=style), end="", soft_wrap=True)
        else:
            self._console.file.write(text)
        self._console.file.flush()


class TokenPrinter:
    """Prints completions token by token, but never half a character or a part of a stop text.

    Args:
        printer: prints the pieces.
        tokenizer: decodes the tokens.
        prompts: each is printed before its completion.
        config: how completions end.
    """

    def __init__(
        self, printer: CompletionPrinter, tokenizer: Tokenizer, prompts: Sequence[str], config: GenerationConfig
    ) -> None:
        self._printer = printer
        self._text = TextStream(tokenizer, config.stop, config.min_new_tokens)
        self._prompts = prompts
        self._index: int | None = None

    def push(self, index: int, token_id: int) -> None:
        """Print one token of the completion of prompt number `index`; prompts come one after another."""
        if index != self._index:
            self._printer.prompt(self._prompts[index])
            self._index = index
        self._printer.piece(self._text.push(token_id))

    def finish(self) -> None:
        """End the current completion."""
        self._printer.piece(self._text.finish())
        self._printer.end()
