"""Which raw text a run reads: a file, a directory, rows with a field `text`, or a mixture of several sources.

A mixture is a YAML list; paths are relative to its file:

    - name: wiki            # of letters, digits, _ . and -
      path: wiki.jsonl      # a file or a directory
      weight: 0.7           # share of the tokens; only ratios between sources count
      language: en          # optional; sources of a language are also evaluated together
    - name: books
      path: books
      weight: 0.3
"""

import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomlm.data.corpus import TEXT_SUFFIX
from bloomlm.data.files import FileRows, RowSource
from bloomlm.data.mixture import Mixture, Source
from bloomlm.data.token_files import TextInput, file_inputs, load_token_files, rows_input
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.windows import TextWindows
from bloomlm.errors import DataError
from bloomlm.files.yaml_text import read_yaml

MIXTURE_SUFFIXES = (".yaml", ".yml")
_NAME = re.compile(r"[\w.-]+")
_KEYS: dict[str, type | tuple[type, ...]] = {"name": str, "path": str, "weight": (int, float), "language": str}
_REQUIRED = ("name", "path", "weight")


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A source of raw text before it is read."""

    name: str
    inputs: Callable[[], list[TextInput]]
    """Its documents; raises DataError if there are none."""
    weight: float = 1.0
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextSources:
    """The sources of one split."""

    name: str
    """What names them, for messages."""
    sources: tuple[TextSource, ...]


def is_text_path(path: str | Path) -> bool:
    """Whether a path can only name raw text: a directory, or a .txt file."""
    path = Path(path).expanduser()
    return path.is_dir() or path.suffix.lower() == TEXT_SUFFIX


def sources_of_path(path: str | Path) -> TextSources:
    """One source: a file, or all files of a directory."""
    found = Path(path).expanduser()
    source = TextSource(name=str(found), inputs=lambda: file_inputs(found))
    return TextSources(name=str(found), sources=(source,))


def sources_of_rows(rows: RowSource) -> TextSources:
    """One source: rows with a field `text`."""
    if isinstance(rows, FileRows):
        return sources_of_path(rows.path)
    source = TextSource(name=rows.name, inputs=lambda: [rows_input(rows)])
    return TextSources(name=rows.name, sources=(source,))


def read_mixture(path: str | Path, *, weighted: bool = True) -> TextSources:
    """Read a mixture, see the top of this file.

    Args:
        path: the YAML file.
        weighted: whether its sources must have weights; evaluation uses none, and refuses them.

    Raises:
        DataError: it cannot be read, or an entry is wrong; the message says where.
    """
    path = Path(path).expanduser()
    try:
        entries = read_yaml(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a YAML list of sources") from error
    except ValueError as error:
        raise DataError(f"{path}: not YAML ({error}); expected a list of sources, each with name and path") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"{path}: expected a list of sources, each with name, path and weight; found {reprlib.repr(entries)}"
        )
    required = _REQUIRED if weighted else _REQUIRED[:-1]
    sources = tuple(
        _read_source(entry, path, f"{path}, source {number}", required, weighted=weighted)
        for number, entry in enumerate(entries, start=1)
    )
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: two sources are named {twice[0]!r}; every source needs another name")
    return TextSources(name=str(path), sources=sources)


def load_mixture(texts: TextSources, tokenizer: Tokenizer, max_length: int, *, show_progress: bool) -> Mixture:
    """Tokenise all sources, or open what earlier runs have tokenised.

    Raises:
        DataError: see load_token_files.
    """
    sources = []
    for source in texts.sources:
        files = load_token_files(source.name, source.inputs(), tokenizer, show_progress=show_progress)
        windows = TextWindows(files, max_length)
        sources.append(Source(name=source.name, windows=windows, weight=source.weight, language=source.language))
    return Mixture(sources, max_length, name=texts.name)


def _read_source(entry: Any, path: Path, where: str, required: tuple[str, ...], *, weighted: bool) -> TextSource:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: found {reprlib.repr(entry)}, expected {', '.join(required)} with their values")
    known = [key for key in _KEYS if weighted or key != "weight"]
    for problem in _problems(entry, known, required):
        raise DataError(f"{where}: {problem}")
    try:
        place = (path.parent / Path(entry["path"]).expanduser()).absolute()
    except RuntimeError as error:  # ~ and the name of nobody
        raise DataError(f"{where}: path is {entry['path']!r:.40}: {error}") from error

    def inputs() -> list[TextInput]:
        try:
            return file_inputs(place)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    return TextSource(
        name=entry["name"],
        inputs=inputs,
        weight=float(entry.get("weight", 1.0)),
        language=entry.get("language"),
    )


def _problems(entry: dict[str, Any], known: list[str], required: tuple[str, ...]) -> Iterator[str]:
    for key in entry:
        if key not in known:
            yield f"found the key {key!r}, expected {', '.join(known)}"
    for key in required:
        if key not in entry:
            yield f"it has no {key}; expected {', '.join(required)}"
    for key, value in entry.items():
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            yield f"{key} is {reprlib.repr(value)}, expected {'a number' if key == 'weight' else 'text'}"
    for key in ("name", "language"):
        if key in entry and not _NAME.fullmatch(entry[key]):
            yield f"{key} is {entry[key]!r:.40}, expected letters, digits, _ . and -"
    if not 0 < entry.get("weight", 1) < float("inf"):
        yield f"weight is {entry['weight']!r}, expected a number above 0"
