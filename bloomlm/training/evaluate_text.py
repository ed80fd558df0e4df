"""Evaluation on raw text: of all sources together, of each of them, and of each language.

Bits per byte are the losses of all learned tokens divided by the bytes that these tokens spell, so models with
different tokenizers can be compared. The end of a document, </s>, costs bits and spells nothing; the first token of a
document is not predicted and counts on neither side. Source: Gao et al., The Pile, https://arxiv.org/abs/2101.00027,
section 3.1.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from bloomlm.data.example import Examples
from bloomlm.data.mixture import Mixture, Source
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.windows import PartialWindows

BITS_PER_BYTE = "eval_bits_per_byte"


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Sums over learned tokens."""

    nats: float = 0.0
    """Sum of their losses."""
    num_correct: float = 0.0
    """Number of them that are the likeliest by the model."""
    num_tokens: int = 0
    num_bytes: int = 0
    """Number of bytes that they spell."""

    def __add__(self, other: Self) -> "TextScore":
        return TextScore(
            nats=self.nats + other.nats,
            num_correct=self.num_correct + other.num_correct,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """The mean loss and bits per byte."""
        bits = self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan
        return {f"eval_loss{suffix}": self.nats / self.num_tokens, f"{BITS_PER_BYTE}{suffix}": bits}


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """What is evaluated at once: the documents of a source that have the same language, or none."""

    source: str
    language: str | None
    windows: Examples
    num_tokens: int
    """Number of learned tokens."""
    num_bytes: int
    """Number of bytes that they spell; special tokens spell none."""


def text_parts(mixture: Mixture, tokenizer: Tokenizer) -> tuple[TextPart, ...]:
    """The parts of all sources. A document has the language that its row names, or else that of its source."""
    sizes = np.array(
        [0 if tokenizer.is_special(i) else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    )
    return tuple(part for source in mixture.sources for part in _parts_of(source, sizes))


def _parts_of(source: Source, sizes: npt.NDArray[np.int64]) -> Iterator[TextPart]:
    windows, names = source.windows, (source.language, *source.windows.language_names)
    num_tokens, num_bytes = np.zeros(len(names), dtype=np.int64), np.zeros(len(names), dtype=np.int64)
    kept: dict[int, list[tuple[int, list[int], int]]] = {}
    for index in range(len(windows)):
        window, codes = windows[index], windows.document_languages(index)
        starts, spelled = list(window.document_starts), sizes[window.tokens]
        lengths = np.diff([*starts, len(window.tokens)])
        np.add.at(num_tokens, codes, lengths - 1)
        np.add.at(num_bytes, codes, np.add.reduceat(spelled, starts) - spelled[starts])
        for code in np.unique(codes).tolist():
            documents = np.flatnonzero(codes == code)
            kept.setdefault(code, []).append((index, documents.tolist(), int(lengths[documents].sum())))
    for code, places in sorted(kept.items()):
        yield TextPart(
            source=source.name,
            language=names[code],
            windows=windows if len(kept) == 1 else PartialWindows(windows, places),
            num_tokens=int(num_tokens[code]),
            num_bytes=int(num_bytes[code]),
        )


def text_metrics(parts: Sequence[TextPart], evaluate: Callable[[Examples], Mapping[str, float]]) -> dict[str, Any]:
    """Metrics over all parts, over each source if there are several, and over each language.

    Args:
        parts: what is evaluated.
        evaluate: the mean loss and the accuracy over the windows of a part, as Objective.evaluate reports them.
    """
    scores = [_score(part, evaluate(part.windows)) for part in parts]
    total = _sum(scores)
    metrics = total.metrics()
    metrics["eval_ppl"] = math.exp(metrics["eval_loss"]) if metrics["eval_loss"] < 700 else math.inf
    metrics["eval_accuracy"] = total.num_correct / total.num_tokens
    for suffix, members in _groups([(part.source, part.language) for part in parts]).items():
        metrics |= _sum(scores[index] for index in members).metrics(suffix)
    return metrics


def text_metric_names(mixture: Mixture) -> tuple[str, ...]:
    """The names of the metrics that text_metrics reports."""
    parts = [
        (source.name, (source.language, *source.windows.language_names)[code])
        for source in mixture.sources
        for code in source.windows.language_codes()
    ]
    names = TextScore(num_tokens=1).metrics()
    return (*names, "eval_ppl", "eval_accuracy", *(name + suffix for suffix in _groups(parts) for name in names))


def _groups(parts: Sequence[tuple[str, str | None]]) -> dict[str, list[int]]:
    """The ends of the names of metrics, each with the indices of its parts, which have a source and a language."""
    sources, languages = zip(*parts, strict=True)
    groups: dict[str, list[int]] = {}
    for prefix, found in (("/", sources if len(set(sources)) > 1 else ()), ("/language/", languages)):
        for name in dict.fromkeys(found):
            if name is not None:
                groups[f"{prefix}{name}"] = [index for index, other in enumerate(found) if other == name]
    return groups


def _score(part: TextPart, found: Mapping[str, float]) -> TextScore:
    return TextScore(
        nats=found["eval_loss"] * part.num_tokens,
        num_correct=found["eval_accuracy"] * part.num_tokens,
        num_tokens=part.num_tokens,
        num_bytes=part.num_bytes,
    )


def _sum(scores: Iterable[TextScore]) -> TextScore:
    return sum(scores, start=TextScore())
