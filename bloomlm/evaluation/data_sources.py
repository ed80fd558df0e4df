"""WikiText and LAMBADA: where --eval_path finds them, how their files are read, and how WikiText is detokenised.

--eval_path is a file, or the name of a data set that is fetched from the Hugging Face hub and kept as a file:

| name          | with <unk>, for the reference protocol | raw, for the others |
|---------------|----------------------------------------|---------------------|
| wikitext-2    | wikitext-2-v1                          | wikitext-2-raw-v1   |
| wikitext-103  | wikitext-103-v1                        | wikitext-103-raw-v1 |
| lambada       | lambada_openai                         | lambada_openai      |

`wikitext-2:valid` is the validation split; a name without a colon is the test split.

WikiText's files (wiki.valid.tokens, wiki.test.raw, ...) hold a line for each paragraph or heading, with spaces around
words, punctuation and line ends: ` = Robert Boulter = `, `starring @-@ role`. The raw variant has all words; the other
one has <unk> for rare ones.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bloomlm.data.files import FileRows
from bloomlm.errors import ConfigError, DataError
from bloomlm.files.atomic import atomic_write
from bloomlm.files.cache_directory import default_cache_dir

WIKITEXT_NAMES = ("wikitext-2", "wikitext-103")
LAMBADA_NAME = "lambada"
_SPLITS = {"test": "test", "valid": "validation"}
# The rules in their order. Source: Megatron-LM's zero-shot evaluation, from which run_eval.py and lm-eval copied
# them. The second rule looks for literal slashes, a mistake of the original that comparable numbers need.
_RULES: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"\{\s*([^}]*?)\s*\}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    *((" ".join("=" * count), "=" * count) for count in (4, 3, 2)),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_UNKNOWN = "<unk>"


def find_data(name_or_path: str, *, raw: bool, cache_dir: Path | None = None) -> Path:
    """The file with the data; a data set given by name is fetched into the cache first.

    Args:
        name_or_path: a file, or a name from the table above.
        raw: whether to fetch the raw variant of WikiText.
        cache_dir: where fetched files are kept; None: default_cache_dir() / "evaluation".

    Raises:
        ConfigError: the `datasets` extra, which fetches, is not installed.
        DataError: there is neither such a file nor such a name, or the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    name, _, split = name_or_path.partition(":")
    split = split or "test"
    if name not in (*WIKITEXT_NAMES, LAMBADA_NAME):
        raise DataError(
            f"{name_or_path}: no such file; expected one such as wiki.valid.tokens or lambada_test.jsonl, or the name "
            f"of a data set: {', '.join((*WIKITEXT_NAMES, LAMBADA_NAME))}"
        )
    if split not in _SPLITS or (name == LAMBADA_NAME and split != "test"):
        splits = "test" if name == LAMBADA_NAME else ", ".join(_SPLITS)
        raise DataError(f"{name_or_path}: {name} has no split {split!r}; it has {splits}")
    cache_dir = cache_dir or default_cache_dir() / "evaluation"
    if name == LAMBADA_NAME:
        cached = cache_dir / "lambada_openai.test.jsonl"
        repository, configuration = "EleutherAI/lambada_openai", "default"
    else:
        configuration = f"{name}-raw-v1" if raw else f"{name}-v1"
        cached = cache_dir / f"{configuration}.{split}.{'raw' if raw else 'tokens'}"
        repository = "Salesforce/wikitext"
    if not cached.is_file():
        rows = _fetch(name_or_path, repository, configuration, _SPLITS[split])
        write = _jsonl if name == LAMBADA_NAME else _wiki_file
        atomic_write(cached, write(rows))
    return cached


def read_text(path: Path) -> str:
    """Read a whole text, such as WikiText.

    Raises:
        DataError: it cannot be read, is not UTF-8, or holds no word.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a text file such as wiki.valid.tokens"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})") from error
    if not text.strip():
        raise DataError(f"{path}: no text in it; expected one such as wiki.valid.tokens")
    return text


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text whose last word is to be guessed."""

    text: str
    where: str
    """Its place for error messages, e.g. "lambada_test.jsonl, line 3"."""


def read_passages(path: Path) -> list[Passage]:
    """Read LAMBADA: a .jsonl file with `text` in each line, or a .json or .csv file with a column text.

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


def detokenize(text: str) -> str:
    """Write a text of WikiText in the usual way, without spaces before punctuation and without @-@.

    >>> detokenize("a well @-@ known town ( pop . 1 @,@ 234 )")
    'a well-known town (pop. 1,234)'
    """
    for pattern, replacement in _RULES:
        if isinstance(pattern, str):
            text = text.replace(pattern, replacement)
        else:
            text = pattern.sub(replacement, text)
    return text


def split_documents(text: str) -> list[str]:
    """Split a file into documents (articles), before each main heading, ` = Title = `.

    Source: lm-eval's data set EleutherAI/wikitext_document_level, which splits the same files.
    """
    documents: list[str] = []
    lines: list[str] = []
    for line in text.split("\n"):
        if _is_main_heading(line):
            documents.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [*(document for document in documents if document.strip()), "\n".join(lines)]


def split_rows(text: str) -> list[str]:
    """Rows as in the hub's data set Salesforce/wikitext: lines with their line ends; blank lines are empty rows."""
    lines = text.split("\n")
    last = lines.pop()
    rows = [line + "\n" for line in lines] + ([last] if last else [])
    return [row if row.strip() else "" for row in rows]


def notices_about(text: str) -> tuple[str, ...]:
    """A notice if the numbers for a text cannot be compared with published ones."""
    if _UNKNOWN not in text:
        return ()
    return (
        f"{text.count(_UNKNOWN)} words of the file are {_UNKNOWN}; published figures of this protocol are on the raw "
        "text, without them",
    )


def _fetch(name: str, repository: str, configuration: str, split: str) -> list[str]:
    try:
        import datasets  # an extra, which files do not need
    except ImportError as error:
        raise ConfigError(
            f"{name} is fetched from the Hugging Face hub, which needs pip install 'bloomlm[datasets]'; "
            "or give a file as --eval_path"
        ) from error
    try:
        return list(datasets.load_dataset(repository, configuration, split=split)["text"])
    except Exception as error:  # no network, no such repository, no disk space: the library says which
        raise DataError(
            f"{name} is not on this machine yet, and {repository} could not be fetched from the Hugging Face hub. "
            f"Connect to the network once, or give a file as --eval_path. The hub client said: {error}"
        ) from error


def _wiki_file(rows: Iterable[str]) -> str:
    """Join the rows into the original file, in which blank lines contain a space."""
    return "".join(row or " \n" for row in rows)


def _jsonl(rows: Iterable[str]) -> str:
    return "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)


def _described(fields: object) -> str:
    if isinstance(fields, dict) and "text" in fields:
        return f"text {fields['text']!r}"
    return f"the fields {', '.join(map(str, fields)) or 'none'}" if isinstance(fields, dict) else repr(fields)


def _is_main_heading(line: str) -> bool:
    joined = line.replace("= = =", "===").replace("= =", "==").strip()
    return joined.startswith("= ") and joined.endswith(" =")
