"""What `bloomlm predict` shows and writes: completions on the terminal, token by token, and in a JSONL file."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.text import Text

from bloomlm.data.tokenizer import StreamDecoder, Tokenizer
from bloomlm.errors import GenerationError
from bloomlm.generation.completion import Completion

_PARTIAL_SUFFIX = ".partial"
# What could steer the terminal; line ends and tabs may stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ResultFile:
    """A JSONL file that grows aside, line by line, and gets its name when it is complete.

    A run that was stopped goes on where it was: what it had written lies beside the file, under a name that holds
    a digest of everything that decides the results.

    Args:
        path: the file to be; one that is there is replaced at the end.
        identity: what decides the results, as text.
        lines_per_prompt: completions of each prompt.

    Raises:
        GenerationError: it cannot be written.
    """

    def __init__(self, path: Path, *, identity: str, lines_per_prompt: int) -> None:
        self.path = path
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._partial = path.with_name(f".{path.name}.{digest}{_PARTIAL_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for other in path.parent.glob(f".{path.name}.*{_PARTIAL_SUFFIX}"):
                if other != self._partial:
                    other.unlink(missing_ok=True)
            self._file: BufferedRandom = self._partial.open("a+b")
            self.completions = self._read_back(lines_per_prompt)
            """What an earlier run left, whole prompts only."""
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, completion: Completion) -> None:
        """Add one line, which is in the file when this returns."""
        line = json.dumps(dataclasses.asdict(completion), ensure_ascii=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def finish(self) -> None:
        """Put the complete file in its place."""
        try:
            os.fsync(self._file.fileno())
            self._partial.replace(self.path)
            _sync_directory(self.path.parent)
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read_back(self, lines_per_prompt: int) -> list[Completion]:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        completions = []
        with suppress(ValueError, TypeError):  # a line that was cut off, or lost with the power
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                completions.append(Completion(**json.loads(line)))
        num_whole = len(completions) // lines_per_prompt * lines_per_prompt
        self._file.truncate(sum(map(len, lines[:num_whole])))
        return completions[:num_whole]

    def _cannot_write(self, error: OSError) -> GenerationError:
        return GenerationError(
            f"--output_file {self.path} cannot be written: {error.strerror or error}. "
            "What was written so far is kept; the same command goes on from there"
        )


def _sync_directory(directory: Path) -> None:
    """Bring the names of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
