"""Evaluation on raw text: of all sources together, of each of them, and of each language.

Bits per byte are the losses of all learned tokens divided by the bytes that these tokens spell, so models with
different tokenizers can be compared. The end of a document, </s>, costs bits and spells nothing; the first token of a
document is not predicted and counts on neither side. Source: Gao et al., The Pile, https://arxiv.org/abs/2101.00027,
section 3.1.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from bloomlm.data.mixture import Mixture
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.windows import TextWindows


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
        return {f"eval_loss{suffix}": self.nats / self.num_tokens, f"eval_bits_per_byte{suffix}": bits}


def text_metrics(
    mixture: Mixture, evaluate: Callable[[TextWindows], Mapping[str, float]], byte_counts: Mapping[str, int]
) -> dict[str, Any]:
    """Metrics over all sources, and of each source and each language if there are several or one is named.

    Args:
        mixture: the sources.
        evaluate: the mean loss and the accuracy over the windows of one source, as Objective.evaluate reports them.
        byte_counts: the bytes that the learned tokens of each source spell.
    """
    scores: dict[str, TextScore] = {}
    for source in mixture.sources:
        found, count = evaluate(source.windows), source.windows.num_supervised_tokens
        scores[source.name] = TextScore(
            nats=found["eval_loss"] * count,
            num_correct=found["eval_accuracy"] * count,
            num_tokens=count,
            num_bytes=byte_counts[source.name],
        )
    total = _sum(scores.values())
    metrics = total.metrics()
    metrics["eval_ppl"] = math.exp(metrics["eval_loss"]) if metrics["eval_loss"] < 700 else math.inf
    metrics["eval_accuracy"] = total.num_correct / total.num_tokens
    if len(scores) > 1:
        for name, score in scores.items():
            metrics |= score.metrics(f"/{name}")
    for language in dict.fromkeys(source.language for source in mixture.sources):
        if language is not None:
            spoken = (scores[source.name] for source in mixture.sources if source.language == language)
            metrics |= _sum(spoken).metrics(f"/language/{language}")
    return metrics


def count_bytes(mixture: Mixture, tokenizer: Tokenizer) -> dict[str, int]:
    """The bytes that the learned tokens of each source spell; special tokens spell none."""
    sizes = np.array(
        [0 if tokenizer.is_special(i) else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    )
    return {source.name: _learned_bytes(source.windows, sizes) for source in mixture.sources}


def _learned_bytes(windows: TextWindows, sizes: npt.NDArray[np.int64]) -> int:
    total = 0
    for index in range(len(windows)):
        window = windows[index]
        total += int(sizes[window.tokens].sum() - sizes[window.tokens[list(window.document_starts)]].sum())
    return total


def _sum(scores: Iterable[TextScore]) -> TextScore:
    return sum(scores, start=TextScore())
