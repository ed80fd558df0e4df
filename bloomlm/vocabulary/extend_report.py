"""The report of an extension: sizes, new tokens, and held-out text of new and kept languages before and after."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bloomlm.checkpoint.output import Report
from bloomlm.data.corpus import Piece
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.vocabulary.embedding import changed_model
from bloomlm.vocabulary.extend import Extension
from bloomlm.vocabulary.measure import Fit, measure
from bloomlm.vocabulary.merges import WordEncoder
from bloomlm.vocabulary.report import compare_fits, fit_table, table

NUM_TOKENS_SHOWN = NUM_WORDS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """Held-out text under the old and the extended vocabulary and model."""

    before: Mapping[str, Fit]
    """Of each language."""
    after: Mapping[str, Fit]
    num_words: Mapping[str, int]
    """Words as the pre-tokenizer cuts them, of each language."""
    num_changed_words: Mapping[str, int]
    """Those of other ids than before."""
    changed_words: Counter[tuple[int, ...]]
    """How often each of these occurs, by their old ids."""
    new_tokens: Counter[int]
    """How often each new token occurs."""


def measure_extension(
    pieces: Sequence[Piece],
    model: BloomForCausalLM | None,
    tokenizer: Tokenizer,
    extension: Extension,
    report: Report,
) -> HeldOutText:
    """Measure held-out text before and after.

    Args:
        pieces: the texts.
        model: the old one, in eval mode; None: bits per byte are left out.
        tokenizer: the old one.
        extension: what they are extended by.
        report: called with a number of bytes of text as they are done, twice for each.
    """
    before = measure(pieces, tokenizer, model, report)
    extended = None if model is None else changed_model(model, extension)
    after = measure(pieces, extension.tokenizer, extended, report)
    encode, encode_extended = WordEncoder(tokenizer), WordEncoder(extension.tokenizer)
    num_words, num_changed, changed = Counter[str](), Counter[str](), Counter[tuple[int, ...]]()
    new_tokens = Counter[int]()
    for piece in pieces:
        (old,), (new,) = encode([piece.text]), encode_extended([piece.text])
        num_words[piece.language] += len(old)
        others = [tuple(word) for word, other in zip(old, new, strict=True) if word != other]
        num_changed[piece.language] += len(others)
        changed.update(others)
        new_tokens.update(token for word in new for token in word if token in extension.tokens)
    return HeldOutText(
        before=before,
        after=after,
        num_words=num_words,
        num_changed_words=num_changed,
        changed_words=changed,
        new_tokens=new_tokens,
    )


def report_values(
    source_name: str,
    config: BloomConfig,
    tokenizer: Tokenizer,
    extension: Extension,
    new: HeldOutText,
    kept: HeldOutText,
) -> dict[str, Any]:
    """The contents of report.json.

    Args:
        source_name: what the user calls the old model.
        config: the old model's.
        tokenizer: the old model's.
        extension: what was written.
        new: held-out text of the corpus.
        kept: text of languages that shall stay as they are; may be empty.
    """
    return {
        "source": source_name,
        "before": _sizes(config, tokenizer),
        "after": _sizes(extension.config, extension.tokenizer),
        "first_token": extension.tokens.start,
        "new_tokens": [
            {
                "id": token_id,
                "text": extension.tokenizer.decode([token_id]),
                "pieces": [tokenizer.decode([piece]) for piece in token.pieces],
                "occurrences": new.new_tokens[token_id],
            }
            for token_id, token in zip(extension.tokens, extension.new, strict=True)
        ],
        "new": _text_values(new, tokenizer, extension.tokenizer),
        "kept": _text_values(kept, tokenizer, extension.tokenizer) if kept.before else None,
    }


def report_markdown(values: Mapping[str, Any]) -> str:
    """The contents of report.md, from those of report.json."""
    before, after = values["before"], values["after"]
    sizes = [[name, f"{before[name]:,}", f"{after[name]:,}"] for name in before]
    most = sorted(values["new_tokens"], key=lambda row: -row["occurrences"])[:NUM_TOKENS_SHOWN]
    tokens = [[_shown(row["text"]), str(row["id"]), _joined(row["pieces"]), f"{row['occurrences']:,}"] for row in most]
    parts = [
        f"# Vocabulary of {values['source']}, extended",
        table(["", "before", "after"], sizes),
        "## Held-out text of the new corpus",
        fit_table(values["new"]["fits"]),
        change_line(values["new"]),
    ]
    if values["kept"] is not None:
        words = [
            [_shown(row["word"]), _joined(row["before"]), _joined(row["after"]), f"{row['occurrences']:,}"]
            for row in values["kept"]["most_frequent_changed"]
        ]
        parts += ["## Text of the kept languages", fit_table(values["kept"]["fits"]), change_line(values["kept"])]
        parts += [table(["word", "before", "after", "occurrences"], words)] if words else []
    parts += [
        "Scripts without spaces between words count a character as a word. Bits per byte are those before any "
        "training: a new row is the mean of the rows that it replaces, and has to be trained.",
        "## New tokens",
        f"The most frequent in held-out text of {len(values['new_tokens']):,}, with what they replace:",
        table(["token", "id", "pieces", "occurrences"], tokens),
    ]
    return "\n\n".join(parts)


def change_line(text: Mapping[str, Any]) -> str:
    """How many words have other tokens than before, in a sentence."""
    changed, words = text["changed_words"], text["words"]
    return f"{changed:,} of {words:,} words ({changed / max(1, words):.3%}) have other tokens than before."


def _sizes(config: BloomConfig, tokenizer: Tokenizer) -> dict[str, int]:
    return {"tokens": tokenizer.vocab_size, "rows": config.vocab_size, "parameters": config.num_parameters}


def _text_values(text: HeldOutText, tokenizer: Tokenizer, extended: Tokenizer) -> dict[str, Any]:
    return {
        "fits": compare_fits(text.before, text.after),
        "words": sum(text.num_words.values()),
        "changed_words": sum(text.num_changed_words.values()),
        "changed_words_by_language": {name: text.num_changed_words[name] for name in text.before},
        "most_frequent_changed": [
            {
                "word": tokenizer.decode(ids),
                "before": [tokenizer.decode([token]) for token in ids],
                "after": [extended.decode([token]) for token in extended.encode(tokenizer.decode(ids))],
                "occurrences": count,
            }
            for ids, count in text.changed_words.most_common(NUM_WORDS_SHOWN)
        ],
    }


def _joined(tokens: Sequence[str]) -> str:
    return " ".join(map(_shown, tokens))


def _shown(text: str) -> str:
    escaped = text.replace("\n", "\\n").replace("`", "'").replace("|", "\\|")
    return f"`{escaped}`"
