"""Rows of .jsonl, .json, .csv and .parquet files, each with its line number. rows.py knows what their fields mean.

Files of .jsonl and .parquet are read a part at a time; those of .json and .csv fit into memory.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bloomlm.errors import ConfigError, DataError
from bloomlm.files.json_text import parse_json, parse_json_at

_SPACE = re.compile(r"\s*")
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a data set."""

    fields: Mapping[str, object]
    where: str
    """Where the row is, for error messages: "train.jsonl, line 3"."""


class RowSource(Protocol):
    """A source of rows, which can be read repeatedly."""

    @property
    def name(self) -> str:
        """Name of the source in messages."""

    def rows(self) -> Iterator[Row]:
        """The rows in order; raises DataError at a row that cannot be read."""

    def fingerprint(self) -> str:
        """Hex digest of everything that the result of rows() depends on."""


class FileRows:
    """The rows of one file.

    Args:
        path: a UTF-8 file, with or without a byte order mark: .jsonl (one object on each line), .json (a list of
            objects, or one object on each line), .csv (separated by commas, with column names in the first line) or
            .parquet (which needs pyarrow).

    Raises:
        DataError: the file cannot be read, or its name has another ending.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.name = str(self.path)
        if self.path.suffix.lower() not in _READERS:
            raise DataError(
                f"{self.path}: a file of examples ends in {', '.join(_READERS)}, not in {self.path.suffix!r}"
            )
        if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
            raise DataError(f"{self.path}: is a pipe or a device, and rows are read more than once; save them")
        try:
            self.path.open("rb").close()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); expected a file of examples") from error

    def rows(self) -> Iterator[Row]:
        """Rows in the order of the file; blank lines are skipped."""
        return _READERS[self.path.suffix.lower()](self.path)

    def fingerprint(self) -> str:
        """Digest of the ending and the content of the file."""
        with self.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(f"{self.path.suffix.lower()} {content}".encode()).hexdigest()


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            where = f"{path}, line {line}"
            text = _decode(raw.removeprefix(_BOM) if line == 1 else raw, path, first_line=line)
            if text.strip():
                yield _object_row(_parse_line(text, where), where)


def _read_json(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    return _read_json_list(path) if head.startswith(b"[") else _read_jsonl(path)


def _read_json_list(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    position = _skip_space(text, _skip_space(text, 0) + 1)
    counted, line = 0, 1
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        where = f"{path}, line {line}"
        try:
            value, position = parse_json_at(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
        yield _object_row(value, where)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            line += text.count("\n", counted, position)
            raise DataError(f"{path}, line {line}: expected ',' or ']' in the list, found {_shown(text, position)}")
    end = _skip_space(text, position + 1)
    if end < len(text):
        line = 1 + text.count("\n", 0, end)
        raise DataError(f"{path}, line {line}: expected the end of the file, found {_shown(text, end)}")


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not CSV ({error}); use .jsonl for fields of any kind") from error
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = _csv_names(cells, f"{path}, line {line}")
        elif len(cells) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells, but the first line names {len(names)} columns "
                f"({', '.join(names)}). Put double quotes around text that has commas or line ends"
            )
        else:
            yield Row(fields=dict(zip(names, cells, strict=True)), where=f"{path}, line {line}")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow  # comes with an extra
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: to read .parquet needs: pip install 'bloomlm[datasets]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields=fields, where=f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number} ({error}); write it again") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
ROW_SUFFIXES = tuple(_READERS)
"""The endings of files of rows."""


def _csv_names(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: two columns are named {twice[0]!r}; every column needs a different name")
    return names


def _parse_line(text: str, where: str) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); expected one whole object on each line"
        ) from error


def _object_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with named fields, found {type(value).__name__}")
    return Row(fields=value, where=where)


def _read_text(path: Path) -> str:
    return _decode(path.read_bytes().removeprefix(_BOM), path, first_line=1)


def _decode(raw: bytes, path: Path, *, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from error


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string too
    return match.end()


def _shown(text: str, position: int) -> str:
    return repr(text[position : position + 20]) if position < len(text) else "the end of the file"
