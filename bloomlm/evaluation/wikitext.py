"""WikiText's text: reading it, its documents, its rows, and how its tokenisation is undone.

The files (wiki.valid.tokens, wiki.test.raw, ...) hold a line for each paragraph or heading, words, punctuation and
line ends set apart by blanks: ` = Robert Boulter = `, `starring @-@ role`. The raw variant has the words that the
other replaces by <unk>.
"""

import re
from pathlib import Path

from bloomlm.errors import DataError

# Every rule in its order. Source: Megatron-LM's zero-shot evaluation, from which run_eval.py and lm-eval have
# theirs; the second one looks for literal slashes, a slip of the original that comparable numbers need.
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


def read_text(path: Path) -> str:
    """The whole file.

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


def detokenize(text: str) -> str:
    """The text as people write it: no blanks before punctuation, no @-@.

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
    """Documents (articles) of a file, cut before each main heading, ` = Title = `.

    Source: lm-eval's data set EleutherAI/wikitext_document_level, which cuts the same files.
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
    """Rows as the hub's data set Salesforce/wikitext has them: lines with their ends, blank ones empty."""
    lines = text.split("\n")
    last = lines.pop()
    rows = [line + "\n" for line in lines] + ([last] if last else [])
    return [row if row.strip() else "" for row in rows]


def notices_about(text: str) -> tuple[str, ...]:
    """What makes numbers on this text differ from published ones."""
    if _UNKNOWN not in text:
        return ()
    return (
        f"{text.count(_UNKNOWN)} words of the file are {_UNKNOWN}; published figures of this protocol are on the raw "
        "text, without them",
    )


def _is_main_heading(line: str) -> bool:
    joined = line.replace("= = =", "===").replace("= =", "==").strip()
    return joined.startswith("= ") and joined.endswith(" =")
