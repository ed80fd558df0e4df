"""The prompts of `bloomlm predict` and `infer`: from flags, a file, a data set or a pipe."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomlm.data.files import FileRows, Row, RowSource
from bloomlm.data.rows import PromptTemplate, read_pair, read_source
from bloomlm.data.splits import BUILTIN_PREFIX, open_dataset
from bloomlm.errors import ConfigError, DataError

NO_PROMPTS = (
    "no prompts; give --prompt 'Once upon a time', --data_file prompts.txt (or .jsonl), "
    "or send them through a pipe, one on each line"
)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one run."""

    texts: list[str]
    targets: list[str] | None = None
    """The right answer to each prompt; None unless the data have one for every prompt."""


def read_prompts(prompt: Sequence[str], data_file: str | None, prompt_template: str | None) -> Prompts | None:
    """Read the prompts from the flags or from a pipe.

    Args:
        prompt: the texts of --prompt.
        data_file: a .txt file with a prompt on each line; a .jsonl, .json or .csv file with rows as in training; or a
            data set (`builtin:NAME` or a directory), of which the test split is read, or else the dev split.
        prompt_template: builds the prompt of each row from its fields.

    Returns:
        None if neither a flag nor a pipe gives prompts.

    Raises:
        ConfigError: flags that do not go together.
        DataError: nothing to read, or a row that cannot be used.
    """
    if prompt and data_file is not None:
        raise ConfigError("--prompt and --data_file both bring prompts; give one of them")
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
