"""The prompts of `bloomlm predict` and `infer`: from flags, a file, a data set or a pipe."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomlm.data.files import FileRows, Row, RowSource
from bloomlm.data.messages import Message, has_messages, read_messages
from bloomlm.data.rows import PromptTemplate, read_pair, read_source
from bloomlm.data.splits import BUILTIN_PREFIX, open_dataset
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from bloomlm.flags import Flags, flag

NO_PROMPTS = (
    "no prompts; give --prompt 'Once upon a time', --data_file prompts.txt (or .jsonl), --messages_file talks.jsonl, "
    "or send them through a pipe, one on each line"
)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one run."""

    texts: list[str]
    targets: list[str] | None = None
    """The right answer to each prompt; None unless the data have one for every prompt."""

    def of(self, tokenizer: Tokenizer) -> "Prompts":
        """These prompts, which are the same for every model."""
        return self


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Conversations, which a chat template turns into prompts."""

    rows: list[tuple[list[Message], str]]
    """The turns of each, and where it is, for messages."""
    chat_template: str | None
    """The flag of that name."""

    def of(self, tokenizer: Tokenizer) -> Prompts:
        """The prompts for a model: a conversation up to its last answer, or the whole if its last turn is the user's.

        Raises:
            ConfigError: there is no chat template, or it cannot be used.
            DataError: the template does not take a conversation.
        """
        # brings Jinja, which plain prompts do not need
        from bloomlm.data.chat_template import chat_template_of, with_given_template

        tokenizer = with_given_template(tokenizer, self.chat_template)
        template = chat_template_of(tokenizer, "--messages_file holds conversations")
        texts, targets = [], []
        for messages, where in self.rows:
            asked = messages
            if messages[-1]["role"] == "assistant":
                asked, target = messages[:-1], messages[-1]["content"]
                targets.append(target)
            try:
                texts.append(template.render(asked, add_generation_prompt=True))
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        return Prompts(texts=texts, targets=targets if len(targets) == len(texts) else None)


@dataclass(frozen=True, kw_only=True)
class PromptFlags(Flags):
    """Where the prompts come from."""

    prompt: tuple[str, ...] = flag("prompts", (), "text to complete; give the flag again for more", repeatable=True)
    data_file: str | None = flag(
        "prompts",
        None,
        "prompts: .txt (one on each line), .jsonl, .json, .csv or .parquet (rows as in training), builtin:dates",
    )
    messages_file: str | None = flag(
        "prompts",
        None,
        "conversations to answer: .jsonl, .json or .parquet with `messages` or ShareGPT's `conversations`",
    )
    chat_template: str | None = flag(
        "prompts", None, "Jinja template of --messages_file: a file, or plain  [default: that of the model]"
    )
    prompt_template: str | None = flag(
        "prompts", None, "builds the prompt of each row from its fields, e.g. '{instruction}\\n{input}\\nAnswer:'"
    )
    src_length: int = flag("prompts", 200, "maximum tokens of a prompt; a longer one loses its end")

    @property
    def most_prompt_tokens(self) -> int | None:
        """The length to which prompts are cut; None: conversations, which end with their question, are not cut."""
        return self.src_length if self.messages_file is None else None

    def read_prompts(self) -> Prompts | Conversations | None:
        """The prompts, from a flag or a pipe; None where there are none.

        Raises:
            ConfigError: flags that do not go together.
            DataError: nothing to read, or a row that cannot be used.
        """
        sources = {"prompt": self.prompt, "data_file": self.data_file, "messages_file": self.messages_file}
        given = [f"--{name}" for name, value in sources.items() if value]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} both bring prompts; give one of them")
        if self.messages_file is not None:
            self._check_messages_flags()
            return _read_conversations(self.messages_file, self.chat_template)
        if self.chat_template is not None:
            raise ConfigError("--chat_template turns conversations into prompts; give --messages_file, or leave it out")
        return _read_texts(self.prompt, self.data_file, self.prompt_template)

    def _check_messages_flags(self) -> None:
        if self.prompt_template is not None:
            raise ConfigError("--prompt_template does not act on --messages_file; --chat_template does")
        if self.src_length != PromptFlags.src_length:
            raise ConfigError(
                "--src_length would cut the end of a prompt, where a conversation has its question; leave it out: "
                "--messages_file is never cut"
            )


def _read_conversations(path: str, chat_template: str | None) -> Conversations:
    rows = FileRows(path)
    found = [(read_messages(row), row.where) for row in rows.rows()]
    if not found:
        raise DataError(f"{path}: no rows in it; expected at least one conversation")
    for messages, where in found:
        if messages[-1]["role"] == "system" or (len(messages) == 1 and messages[0]["role"] == "assistant"):
            raise DataError(
                f"{where}: there is nothing to answer; expected a user message, and at most its answer, at the end"
            )
    return Conversations(rows=found, chat_template=chat_template)


def _read_texts(prompt: Sequence[str], data_file: str | None, prompt_template: str | None) -> Prompts | None:
    """Read the prompts from the flags or from a pipe.

    Args:
        prompt: the texts of --prompt; then there is no file.
        data_file: a .txt file with a prompt on each line; a .jsonl, .json or .csv file with rows as in training; or a
            data set (`builtin:NAME` or a directory), of which the test split is read, or else the dev split.
        prompt_template: builds the prompt of each row from its fields.

    Returns:
        None if neither a flag nor a pipe gives prompts.

    Raises:
        ConfigError: flags that do not go together.
        DataError: nothing to read, or a row that cannot be used.
    """
    is_lines = data_file is not None and data_file.lower().endswith(".txt")
    if prompt_template is not None and (data_file is None or is_lines):
        raise ConfigError(
            "--prompt_template fills in the fields of rows; give a --data_file that has fields (.jsonl, .json, .csv)"
        )
    if prompt:
        return Prompts(texts=list(prompt))
    if data_file is None:
        return None if sys.stdin is None or sys.stdin.isatty() else _from_lines(sys.stdin.read())
    if is_lines:
        found = _from_lines(_read_text(Path(data_file)))
        if found is None:
            raise DataError(f"{data_file}: no prompts in it; expected one on each line")
        return found
    return _from_rows(_open_rows(data_file), PromptTemplate(prompt_template) if prompt_template else None)


def _from_lines(text: str) -> Prompts | None:
    # split, not splitlines: a prompt may hold U+2028 and its like
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    return Prompts(texts=lines) if lines else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; expected a text file with a prompt on each line"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error


def _open_rows(name: str) -> RowSource:
    if not (name.startswith(BUILTIN_PREFIX) or Path(name).is_dir()):
        return FileRows(name)
    splits = open_dataset(name)
    rows = splits.test or splits.dev
    if rows is None:
        raise DataError(f"{name}: has neither a test nor a dev split; name one of its files instead")
    return rows


def _from_rows(rows: RowSource, template: PromptTemplate | None) -> Prompts:
    first = next(iter(rows.rows()), None)
    if first is not None and template is None and has_messages(first.fields):
        raise ConfigError(f"{rows.name}: its rows are conversations; give the file as --messages_file")
    pairs = [(read_source(row, template), _target(row, template)) for row in rows.rows()]
    if not pairs:
        raise DataError(f"{rows.name}: no rows in it; expected at least one")
    targets = [target for _, target in pairs if target is not None]
    # If some rows have no target, the score of the others would mislead.
    return Prompts(texts=[text for text, _ in pairs], targets=targets if len(targets) == len(pairs) else None)


def _target(row: Row, template: PromptTemplate | None) -> str | None:
    try:
        return read_pair(row, template).target
    except DataError:
        return None
