"""LAMBADA's texts: passages whose last word is to be guessed, one JSON object with `text` on each line."""

from dataclasses import dataclass
from pathlib import Path

from bloomlm.data.files import FileRows
from bloomlm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One text."""

    text: str
    where: str
    """For error messages: "lambada_test.jsonl, line 3"."""


def read_passages(path: Path) -> list[Passage]:
    """The passages of a .jsonl file (or .json, .csv with a column text).

    Raises:
        DataError: the file cannot be read, a line is no JSON object with a text, or there is none.
    """
    passages = []
    for row in FileRows(path).rows():
        text = row.fields.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f'{row.where}: expected an object such as {{"text": "... the last word"}}, found '
                f"{_described(row.fields)}"
            )
        passages.append(Passage(text=text, where=row.where))
    if not passages:
        raise DataError(f"{path}: no passages in it; expected a JSON object with `text` on each line")
    return passages


def _described(fields: object) -> str:
    if isinstance(fields, dict) and "text" in fields:
        return f"text {fields['text']!r}"
    return f"the fields {', '.join(map(str, fields)) or 'none'}" if isinstance(fields, dict) else repr(fields)
