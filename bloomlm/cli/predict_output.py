"""What `bloomlm predict` shows and writes: completions on the terminal, token by token, and in a JSONL file."""

import dataclasses
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.text import Text

from bloomlm.checkpoint.atomic import atomic_write
from bloomlm.checkpoint.resumable import ResumableResults
from bloomlm.data.tokenizer import StreamDecoder, Tokenizer
from bloomlm.generation.completion import Completion

# What could steer the terminal; line ends and tabs may stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ResultFile:
    """A JSONL file of completions that appears when it is complete; a stopped run continues after its last prompt.

    Args:
        path: the file to be; one that is there is replaced at the end.
        identity: what decides the completions, as text.
        lines_per_prompt: completions of each prompt.

    Raises:
        CheckpointError: it cannot be written.
    """

    def __init__(self, path: Path, *, identity: str, lines_per_prompt: int) -> None:
        self.path = path
        self._results = ResumableResults(path, identity=identity)
        found: list[Completion] = []
        with suppress(KeyError, TypeError):
            while len(found) < len(self._results.done):
                found.append(Completion(**self._results.done[len(found)]))
        self.completions = found[: len(found) // lines_per_prompt * lines_per_prompt]
        """The completions so far; at first those that an earlier run left, whole prompts only."""

    def write(self, completion: Completion) -> None:
        """Add one completion, which is in a file when this returns."""
        self._results.add({len(self.completions): dataclasses.asdict(completion)})
        self.completions.append(completion)

    def finish(self) -> None:
        """Put the complete file in its place."""
        lines = (json.dumps(dataclasses.asdict(completion), ensure_ascii=False) for completion in self.completions)
        atomic_write(self.path, "".join(line + "\n" for line in lines))
        self._results.remove(of_all_runs=True)

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._results.__exit__(kind, error, trace)


class CompletionPrinter:
    """Prints completions, each under its prompt: whole, or token by token.

    On a terminal in colours and without control characters; into a pipe or a file exactly as they are.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, completion: Completion, number: int | None) -> None:
        """Print a whole completion.

        Args:
            completion: what.
            number: its place among the completions of its prompt, from 1; None where there is only one.
        """
        if number is None or number == 1:
            self.prompt(completion.prompt)
        self.piece(completion.completion if number is None else f"[{number}] {completion.completion}")
        self.end()

    def prompt(self, text: str) -> None:
        """Print a prompt and a line end."""
        self._write(text + "\n", "cyan")

    def piece(self, text: str) -> None:
        """Print a part of a completion, at once."""
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
    """Prints completions while they come, never half a character and never the beginning of a stop text.

    Args:
        printer: prints the pieces.
        tokenizer: whose ids come.
        prompts: printed before what follows them.
        stop: the stop texts, at which a completion is cut.
    """

    def __init__(
        self, printer: CompletionPrinter, tokenizer: Tokenizer, prompts: Sequence[str], stop: Sequence[str]
    ) -> None:
        self._printer = printer
        self._decoder = StreamDecoder(tokenizer)
        self._prompts = prompts
        self._stop = stop
        self._index: int | None = None
        self._held = ""
        self._has_stopped = False

    def push(self, index: int, token_id: int) -> None:
        """Take one token of the completion of prompt `index`; prompts come one after another."""
        if index != self._index:
            self._printer.prompt(self._prompts[index])
            self._index = index
        self._emit(self._decoder.push(token_id))

    def finish(self) -> None:
        """End the present completion."""
        self._emit(self._decoder.finish())
        self._printer.piece(self._held)
        self._printer.end()
        self._held, self._has_stopped = "", False

    def _emit(self, piece: str) -> None:
        if self._has_stopped:
            return
        text = self._held + piece
        ends = [text.index(stop) for stop in self._stop if stop in text]
        # no stop text yet: hold back the longest end of the text that one may begin with
        beginnings = (text[-n:] for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        self._has_stopped = bool(ends)
        self._held = "" if ends else max(beginnings, key=len, default="")
        self._printer.piece(text[: min(ends)] if ends else text.removesuffix(self._held))
