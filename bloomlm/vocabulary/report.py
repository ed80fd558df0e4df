"""What a change of the vocabulary did, as report.json and report.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bloomlm.vocabulary.measure import Fit, total

JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"
PICTURE_FILE = "report.png"


def fit_values(fit: Fit) -> dict[str, Any]:
    """The figures of one language for report.json."""
    return {
        "bytes": fit.num_bytes,
        "words": fit.num_words,
        "tokens": fit.num_tokens,
        "tokens_per_word": fit.tokens_per_word,
        "bits_per_byte": fit.bits_per_byte,
    }


def compare_fits(before: Mapping[str, Fit], after: Mapping[str, Fit]) -> dict[str, Any]:
    """Language -> {"before": ..., "after": ...}; "all" is the sum of the languages."""
    rows = {**{language: (before[language], after[language]) for language in before}}
    rows["all"] = (total(before), total(after))
    return {name: {"before": fit_values(old), "after": fit_values(new)} for name, (old, new) in rows.items()}


def fit_table(comparison: Mapping[str, Any]) -> str:
    """The Markdown table of what compare_fits gives."""
    rows = []
    for language, figures in comparison.items():
        old, new = figures["before"], figures["after"]
        row = [language, f"{old['bytes']:,}", f"{old['tokens_per_word']:.3f}", f"{new['tokens_per_word']:.3f}"]
        row += [number(old["bits_per_byte"]), number(new["bits_per_byte"])]
        rows.append([*row, difference(old["bits_per_byte"], new["bits_per_byte"])])
    names = ("language", "bytes", "tokens per word", "after", "bits per byte", "after", "change")
    return table(names, rows)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are set to the right."""
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """A figure that may be missing."""
    return "-" if value is None else f"{value:.4f}"


def difference(before: float | None, after: float | None) -> str:
    """The change of a figure in its own unit and in percent."""
    if before is None or after is None:
        return "-"
    percent = f" ({(after - before) / before:+.2%})" if before else ""
    return f"{after - before:+.4f}{percent}"


def write_report(directory: Path, values: Mapping[str, Any], markdown: str) -> None:
    """Write report.json and report.md into an existing directory.

    Args:
        directory: where to.
        values: of report.json.
        markdown: of report.md.
    """
    (directory / JSON_FILE).write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (directory / MARKDOWN_FILE).write_text(markdown.rstrip() + "\n", encoding="utf-8")
