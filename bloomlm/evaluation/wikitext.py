"""The format of WikiText: its documents, its rows, and how it is detokenised.

The files (wiki.valid.tokens, wiki.test.raw, ...) hold a line for each paragraph or heading, with spaces around words,
punctuation and line ends: ` = Robert Boulter = `, `starring @-@ role`. The raw variant has the words that the other
one replaces by <unk>.
"""

import re

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


def detokenize(text: str) -> str:
    """The text as people write it: no spaces before punctuation, no @-@.

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
    """Notices about a text whose numbers cannot be compared with published ones."""
    if _UNKNOWN not in text:
        return ()
    return (
        f"{text.count(_UNKNOWN)} words of the file are {_UNKNOWN}; published figures of this protocol are on the raw "
        "text, without them",
    )


def _is_main_heading(line: str) -> bool:
    joined = line.replace("= = =", "===").replace("= =", "==").strip()
    return joined.startswith("= ") and joined.endswith(" =")
