"""The report of a trim: sizes, what was dropped, held-out text before and after, and the curve of several sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.files.picture import has_matplotlib, new_figure, png_of, tidy
from bloomlm.model.config import BloomConfig
from bloomlm.vocabulary.effects import Effects, WholeModel
from bloomlm.vocabulary.measure import total
from bloomlm.vocabulary.report import PICTURE_FILE, compare_fits, fit_table, number, table
from bloomlm.vocabulary.selection import Ids
from bloomlm.vocabulary.trim import Trim

NUM_DROPPED_SHOWN = 20
NO_HELD_OUT = "No text was held out, because the corpus is too small or none was wanted, so nothing was measured."
_BEFORE, _AFTER = "#9aa5b1", "#2563a8"


def report_values(
    source_name: str,
    config: BloomConfig,
    dtype: torch.dtype,
    whole: WholeModel,
    counts: Mapping[str, Ids],
    trimmed: tuple[Trim, Effects],
    sweep: Sequence[tuple[Trim, Effects]],
) -> dict[str, Any]:
    """The contents of report.json.

    Args:
        source_name: what the user calls the whole model.
        config: the whole model's.
        dtype: precision of the files.
        whole: the whole model's figures.
        counts: how often each token occurs in the corpus, by language.
        trimmed: what was written.
        sweep: other sizes.
    """
    trim, effects = trimmed
    return {
        "source": source_name,
        "before": _sizes(config, dtype, whole.tokenizer),
        "after": _sizes(trim.config, dtype, trim.tokenizer),
        "padding_rows": trim.num_padding_rows,
        "corpus_tokens": {language: int(found.sum()) for language, found in counts.items()},
        "dropped": _dropped(whole.tokenizer, counts, trim),
        "held_out": compare_fits(whole.fits, effects.fits),
        "greedy": _greedy(effects),
        "sweep": [_sweep_row(config, dtype, whole, counts, *row) for row in sweep],
    }


def report_markdown(values: Mapping[str, Any]) -> str:
    """The contents of report.md, from those of report.json."""
    before, after, dropped, greedy = (values[key] for key in ("before", "after", "dropped", "greedy"))
    frequent = [
        [f"`{_shown(row['text'])}`", str(row["id"]), f"{row['occurrences']:,}"] for row in dropped["most_frequent"]
    ]
    sizes = [[name, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.1%}"] for name, key in _SIZES]
    parts = [
        f"# Vocabulary of {values['source']}, trimmed",
        table(["", "before", "after", "after / before"], sizes),
        "## Held-out text",
        *_held_out_parts(values["held_out"]),
        "## Greedy decoding",
        greedy_line(greedy),
        "## Dropped",
        f"{dropped['tokens']:,} tokens, {dropped['share']:.4%} of the corpus's token occurrences. "
        + ("The most frequent:" if frequent else "None of them occurs in the corpus."),
        *([table(["token", "id", "occurrences"], frequent)] if frequent else []),
        table(["language", "share of its tokens kept"], [[k, f"{v:.4%}"] for k, v in dropped["coverage"].items()]),
    ]
    if values["sweep"]:
        parts += ["## Sizes", sweep_table(values["sweep"])]
    return "\n\n".join(parts)


def _held_out_parts(held_out: Mapping[str, Any]) -> list[str]:
    if not held_out["all"]["before"]["bytes"]:
        return [NO_HELD_OUT]
    return [fit_table(held_out), "In scripts without spaces between words a word is a character."]


def greedy_line(greedy: Mapping[str, Any]) -> str:
    """What removed tokens change in greedy decoding, in a sentence or two."""
    if not greedy["positions"]:
        return "Not measured."
    return (
        f"At {greedy['removed_likeliest']:,} of {greedy['positions']:,} positions of the held-out text "
        f"({greedy['removed_likeliest'] / greedy['positions']:.3%}) the whole model's likeliest token was removed. "
        f"Of {greedy['prompts']} continuations {greedy['same']} are the same, {greedy['removed_won']} the same up to a "
        f"removed token, {greedy['prompts_changed']} have a removed token in their prompt, {greedy['other']} differ "
        "otherwise."
    )


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table of several sizes."""
    names = ("tokens", "parameters", "MB", "corpus kept", "tokens per word", "bits per byte", "removed likeliest")
    return table(
        names,
        [
            [
                f"{row['tokens']:,}",
                f"{row['parameters']:,}",
                f"{row['bytes'] / 1e6:,.1f}",
                f"{row['coverage']:.4%}",
                f"{row['tokens_per_word']:.3f}",
                number(row["bits_per_byte"]),
                f"{row['removed_likeliest_share']:.3%}",
            ]
            for row in rows
        ],
    )


def write_picture(directory: Path, values: Mapping[str, Any]) -> Path | None:
    """Draw report.png; None where matplotlib is not installed."""
    if not has_matplotlib():
        return None
    num_panels = 3 if values["sweep"] else 2
    figure = new_figure(4.4 * num_panels, 4.2)
    panels = figure.subplots(1, num_panels)
    _draw_sizes(panels[0], values)
    _draw_languages(panels[1], values["held_out"])
    if values["sweep"]:
        _draw_sweep(panels[2], values)
    tidy(*panels)
    for axes in panels:
        axes.set_axisbelow(True)
    figure.suptitle(f"{values['source']}: {values['before']['tokens']:,} to {values['after']['tokens']:,} tokens")
    path = directory / PICTURE_FILE
    path.write_bytes(png_of(figure))
    return path


_SIZES = (
    ("tokens", "tokens"),
    ("rows of the embedding", "rows"),
    ("parameters", "parameters"),
    ("bytes of the weights", "bytes"),
    ("bytes of tokenizer.json", "tokenizer_bytes"),
)


def _sizes(config: BloomConfig, dtype: torch.dtype, tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "tokens": tokenizer.vocab_size,
        "rows": config.vocab_size,
        "parameters": config.num_parameters,
        "embedding_parameters": config.vocab_size * config.hidden_size,
        "bytes": config.num_parameters * dtype.itemsize,
        "tokenizer_bytes": len(tokenizer.json),
    }


def _coverage(counts: Mapping[str, Ids], trim: Trim) -> dict[str, float]:
    return {language: float(found[trim.kept].sum() / max(1, found.sum())) for language, found in counts.items()}


def _dropped(tokenizer: Tokenizer, counts: Mapping[str, Ids], trim: Trim) -> dict[str, Any]:
    everywhere = sum(counts.values(), start=np.zeros_like(next(iter(counts.values()))))
    lost = everywhere.copy()
    lost[trim.kept] = 0
    most = [int(token_id) for token_id in np.argsort(-lost, kind="stable")[:NUM_DROPPED_SHOWN] if lost[token_id]]
    return {
        "tokens": tokenizer.vocab_size - len(trim.kept),
        "occurrences": int(lost.sum()),
        "share": float(lost.sum() / max(1, everywhere.sum())),
        "coverage": _coverage(counts, trim),
        "most_frequent": [
            {"id": token_id, "text": tokenizer.decode([token_id]), "occurrences": int(lost[token_id])}
            for token_id in most
        ],
    }


def _greedy(effects: Effects) -> dict[str, int]:
    texts = effects.greedy
    return {
        "positions": effects.num_positions,
        "removed_likeliest": effects.num_removed_likeliest,
        "prompts": texts.num_prompts,
        "same": texts.num_same,
        "removed_won": texts.num_removed_won,
        "prompts_changed": texts.num_prompts_changed,
        "other": texts.num_other,
    }


def _sweep_row(
    config: BloomConfig,
    dtype: torch.dtype,
    whole: WholeModel,
    counts: Mapping[str, Ids],
    trim: Trim,
    effects: Effects,
) -> dict[str, Any]:
    before, after = total(whole.fits), total(effects.fits)
    return {
        **_sizes(trim.config, dtype, trim.tokenizer),
        "parameters_share": trim.config.num_parameters / config.num_parameters,
        "coverage": min(_coverage(counts, trim).values()),
        "tokens_per_word": after.tokens_per_word,
        "bits_per_byte": after.bits_per_byte,
        "bits_per_byte_before": before.bits_per_byte,
        "removed_likeliest_share": effects.num_removed_likeliest / max(1, effects.num_positions),
    }


def _shown(text: str) -> str:
    return text.replace("\n", "\\n").replace("`", "'").replace("|", "\\|")


def _draw_sizes(axes: Any, values: Mapping[str, Any]) -> None:
    names = ("before", "after")
    embedding = [values[name]["embedding_parameters"] / 1e6 for name in names]
    other = [values[name]["parameters"] / 1e6 - own for name, own in zip(names, embedding, strict=True)]
    axes.bar(names, other, color=_BEFORE, label="blocks")
    axes.bar(names, embedding, bottom=other, color=_AFTER, label="embedding")
    axes.set_ylabel("parameters (million)")
    _put_legend_above_bars(axes)


def _draw_languages(axes: Any, held_out: Mapping[str, Any]) -> None:
    name = "bits_per_byte" if held_out["all"]["before"]["bits_per_byte"] is not None else "tokens_per_word"
    places = np.arange(len(held_out))
    for shift, when, color in ((-0.2, "before", _BEFORE), (0.2, "after", _AFTER)):
        axes.bar(places + shift, [row[when][name] for row in held_out.values()], 0.4, color=color, label=when)
    axes.set_xticks(places, list(held_out), rotation=90 if len(held_out) > 6 else 0)
    axes.set_ylabel(f"{name.replace('_', ' ')} of held-out text")
    _put_legend_above_bars(axes)


def _put_legend_above_bars(axes: Any) -> None:
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="upper center", ncols=2)


def _draw_sweep(axes: Any, values: Mapping[str, Any]) -> None:
    rows = sorted(values["sweep"], key=lambda row: row["tokens"])
    name = "bits_per_byte" if rows[0]["bits_per_byte"] is not None else "tokens_per_word"
    axes.plot([row["bytes"] / 1e6 for row in rows], [row[name] for row in rows], color=_AFTER, marker="o")
    for row in rows:
        axes.annotate(f"{row['tokens']:,}", (row["bytes"] / 1e6, row[name]), xytext=(4, 5), textcoords="offset points")
    axes.axhline(values["held_out"]["all"]["before"][name], color=_BEFORE, linestyle="--", label="before")
    axes.set_xlabel("size of the weights (MB)")
    axes.set_ylabel(f"{name.replace('_', ' ')} of held-out text")
    axes.legend(frameon=False)
