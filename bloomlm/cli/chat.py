"""`bloomlm chat`: talk with a model in the terminal; one without a chat template continues the lines it is given."""

import importlib
import json
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from bloomlm.api import LoadedModel, load
from bloomlm.cli.decoding import DecodingFlags
from bloomlm.cli.dialog import Continuations, Conversation, Dialog
from bloomlm.cli.display import CompletionPrinter
from bloomlm.cli.generator import NOT_OF_PROGRAMS, ProgramFlags, check_generator
from bloomlm.cli.options import config_command
from bloomlm.data.chat_template import ChatTemplate, with_given_template
from bloomlm.errors import BloomlmError, ConfigError
from bloomlm.flags import DeviceFlags, ModelFlags, flag, same_flag
from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.growing import GrowingText
from bloomlm.parallel.launch import find_device
from bloomlm.runtime.program import Program
from bloomlm.serving.text_stream import TextStream

_PROMPT = "> "


@dataclass(frozen=True, kw_only=True)
class ChatConfig(DecodingFlags, ProgramFlags, DeviceFlags, ModelFlags):
    """The flags of `bloomlm chat`."""

    model_name_or_path: str = same_flag(ModelFlags, "model_name_or_path", default="")
    chat_template: str | None = flag(
        "conversation",
        None,
        "Jinja template: a file, or plain  [default: that of the model; without one, lines are continued]",
    )
    system: str = flag("conversation", "", "system message at the beginning, which tells the model how to answer")
    decode_strategy: Literal["greedy", "sampling"] = flag(
        "decoding", "greedy", "how tokens are chosen: the likeliest, or at random"
    )
    max_new_tokens: int = flag("decoding", 512, "maximum tokens of an answer, including </s>", minimum=1)


def chat(config: ChatConfig) -> None:
    """Run `bloomlm chat` until the input ends.

    Raises:
        BloomlmError: flags or files that cannot be used.
    """
    check_generator(config, NOT_OF_PROGRAMS)
    generation = config.generation_with(decode_strategy=config.decode_strategy, max_new_tokens=config.max_new_tokens)
    messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    generator = _open(config)
    template = with_given_template(generator.tokenizer, config.chat_template).chat_template
    dialog: Dialog = Continuations()
    if template is not None:
        dialog = Conversation(ChatTemplate(template, generator.tokenizer.special_tokens), config.system)
    elif config.system:
        dialog.set_system(config.system)
    kind = "no chat template, so it continues your lines" if template is None else "a conversation"
    messages.print(
        f"{config.model_name_or_path or config.model_dir}: {kind}. /help lists the commands; Ctrl-D ends", style="dim"
    )
    read = _read_pipe
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        read = _read_terminal
        with suppress(ImportError):  # gives input() its history and keys; not in every build of Python
            importlib.import_module("readline")
    Chat(generator, dialog, generation, has_seed=config.seed is not None, messages=messages).run(read)


class Chat:
    """Answers lines until there are no more.

    Args:
        generator: what answers.
        dialog: what was said so far.
        generation: how to choose tokens.
        has_seed: whether sampled answers shall be the same in each run.
        messages: where everything but the answers is printed.
    """

    def __init__(
        self,
        generator: LoadedModel | Program,
        dialog: Dialog,
        generation: GenerationConfig,
        *,
        has_seed: bool,
        messages: Console,
    ) -> None:
        self._tokenizer = generator.tokenizer
        self._text = GrowingText(generator.model, generator.tokenizer.decode)
        self._dialog = dialog
        self._generation = generation
        self._has_seed = has_seed
        self._num_answers = 0
        self._messages = messages
        self._printer = CompletionPrinter(Console())
        self._is_over = False

    def run(self, read: Callable[[], str | None]) -> None:
        """Answer each line that `read` returns, and obey those that begin with a slash, until it returns None."""
        while not self._is_over and (line := read()) is not None:
            try:
                if line.startswith("/"):
                    self._obey(*line[1:].partition(" ")[::2])
                elif line.strip():
                    self._answer(line)
            except (BloomlmError, OSError) as error:
                self._messages.print(f"error: {error}")

    def end(self, argument: str) -> None:
        """Answer no more lines."""
        self._is_over = True

    def help(self, argument: str) -> None:
        """List the commands."""
        self._messages.print("\n".join(f"/{name:<{len('system TEXT')}}  {what}" for name, what in _HELP.items()))
        self._messages.print("Ctrl-C stops an answer and keeps what it has; Ctrl-D ends")

    def reset(self, argument: str) -> None:
        """Forget what was said."""
        self._dialog.reset()
        self._note("a new beginning")

    def system(self, argument: str) -> None:
        """Begin anew with a system message."""
        self._dialog.set_system(argument)
        self._note(f"a new beginning, {'with this' if argument else 'without a'} system message")

    def undo(self, argument: str) -> None:
        """Forget the last line and its answer."""
        self._note("the last line and its answer are forgotten" if self._dialog.undo() else "there is nothing to undo")

    def save(self, argument: str) -> None:
        """Add what was said to a file."""
        rows = self._dialog.rows()
        if not argument or not rows:
            raise ConfigError("/save needs a file, such as /save talk.jsonl" if rows else "nothing was answered yet")
        path = Path(argument).expanduser()
        with path.open("a", encoding="utf-8") as output:
            output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._note(f"added to {path}; `bloomlm finetune --train_file` learns from it")

    def _obey(self, name: str, argument: str) -> None:
        if name not in _COMMANDS:
            raise ConfigError(f"/{name} is no command; /help lists them. A line that begins with a space is no command")
        _COMMANDS[name](self, argument.strip())

    def _answer(self, line: str) -> None:
        """Print the answer to a line as it comes; Ctrl-C ends it, and what was printed is kept."""
        prompt = self._dialog.prompt(line)
        config = self._generation
        stream = TextStream(self._tokenizer, config.stop, config.min_new_tokens)
        answer = _StreamedAnswer(self._printer, stream)
        note: str | None = "stopped"
        try:
            reason = self._text.extend(self._tokenizer.encode(prompt), self._next_generation(), answer.push)
            note = f"cut after --max_new_tokens {config.max_new_tokens}" if reason == "length" else None
        except KeyboardInterrupt:
            pass
        answer.finish()
        if answer.text.strip():
            self._dialog.add(line, answer.text)
        else:
            note = "no answer; the line is forgotten"
        if note is not None:
            self._note(note)

    def _next_generation(self) -> GenerationConfig:
        """How to choose the tokens of the next answer; each sampled answer has random numbers of its own."""
        strategy = self._generation.strategy
        if not isinstance(strategy, Sampling):
            return self._generation
        seed = strategy.seed + self._num_answers if self._has_seed else secrets.randbits(63)
        self._num_answers += 1
        return replace(self._generation, strategy=replace(strategy, seed=seed))

    def _note(self, text: str) -> None:
        self._messages.print(f"({text})", style="dim")


_COMMANDS = {
    "help": Chat.help,
    "reset": Chat.reset,
    "system": Chat.system,
    "undo": Chat.undo,
    "save": Chat.save,
    "exit": Chat.end,
}
_HELP = {
    "help": "list the commands",
    "reset": "forget what was said, but not the system message",
    "system TEXT": "begin anew with this system message; without a text, with none",
    "undo": "forget the last line and its answer",
    "save FILE": "add what was said to a file of rows for --train_file and --messages_file",
    "exit": "end",
}


class _StreamedAnswer:
    """Prints an answer while its tokens come, without the blanks at its beginning.

    Args:
        printer: prints the pieces.
        stream: the text of the tokens.
    """

    def __init__(self, printer: CompletionPrinter, stream: TextStream) -> None:
        self._printer = printer
        self._stream = stream
        self.text = ""
        """The text so far."""

    def push(self, token_id: int) -> None:
        """Add a token."""
        self._add(self._stream.push(token_id))

    def finish(self) -> None:
        """End the answer."""
        self._add(self._stream.finish())
        self._printer.end()

    def _add(self, piece: str) -> None:
        shown = piece if self.text.strip() else piece.lstrip()
        self.text += piece
        if shown:
            self._printer.piece(shown)


def _read_terminal() -> str | None:
    """A line that was typed; None after Ctrl-D. Ctrl-C begins the line again."""
    while True:
        try:
            return input(_PROMPT)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()


def _read_pipe() -> str | None:
    """The next line of a pipe or a file; None at its end."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.rstrip("\n") if line else None


def _open(config: ChatConfig) -> LoadedModel | Program:
    if config.model_dir is not None:
        return Program(config.model_dir / config.model_prefix)
    device = find_device(config.device)
    return load(config.model_name_or_path, **config.load_options(), dtype=config.dtype, device=device)


command = config_command(
    "chat",
    ChatConfig,
    chat,
    help="""Talk with a model in the terminal.

    With a chat template, of the model or of --chat_template, it is a conversation; any other model continues the lines
    that it is given. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.

    \b
    bloomlm chat --model_name_or_path builtin:tiny
    bloomlm chat --model_name_or_path bigscience/bloomz-560m --chat_template plain --system "Answer in French."
    bloomlm chat --model_dir inference --model_prefix bloom
    """,
)
