"""How well a tokenizer and a model fit texts: tokens per word, and bits per byte.

Both compare vocabularies fairly: words and bytes are of the text, whatever its tokens are. Each text is scored from
its first token on, after the token that begins a text, so all of its bytes count.

Shapes: M tokens of a batch.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from bloomlm.checkpoint.output import Report, no_report
from bloomlm.data.corpus import Piece
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.parallel.tensor_parallel import head_of
from bloomlm.parallel.vocabulary_scores import LabelScores, score_labels

BATCH_TOKENS = 2048
# Scripts that write no spaces between words; each of their characters counts as a word.
_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(f"[{_WITHOUT_SPACES}]|[^\\s{_WITHOUT_SPACES}]+")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Counts over texts."""

    num_bytes: int
    """Of the texts in UTF-8."""
    num_words: int
    """Words between white space; in scripts that write none, characters."""
    num_tokens: int
    nats: float | None = None
    """The texts' negative log-likelihood in the model; None: it was not computed."""
    likeliest: Counter[int] = field(default_factory=Counter)
    """How often each token was the likeliest next one; empty without a model."""

    @property
    def tokens_per_word(self) -> float:
        """Fertility: 1 where every word is a token."""
        return self.num_tokens / max(1, self.num_words)

    @property
    def bits_per_byte(self) -> float | None:
        """What a byte of the texts costs under the model."""
        return None if self.nats is None else self.nats / math.log(2) / max(1, self.num_bytes)

    def __add__(self, other: "Fit") -> "Fit":
        nats = None if self.nats is None or other.nats is None else self.nats + other.nats
        return Fit(
            num_bytes=self.num_bytes + other.num_bytes,
            num_words=self.num_words + other.num_words,
            num_tokens=self.num_tokens + other.num_tokens,
            nats=nats,
            likeliest=self.likeliest + other.likeliest,
        )


def measure(
    pieces: Iterable[Piece], tokenizer: Tokenizer, model: BloomForCausalLM | None, report: Report = no_report
) -> dict[str, Fit]:
    """Measure texts of each language.

    Args:
        pieces: the texts.
        tokenizer: encodes them.
        model: scores them, in eval mode; None: bits per byte are left out.
        report: called with a number of bytes of text as they are done.

    Returns:
        Language -> its figures, in alphabetical order.
    """
    figures: dict[str, Fit] = {}
    for language, group in groupby(sorted(pieces, key=lambda piece: piece.language), key=lambda piece: piece.language):
        texts = [piece.text for piece in group]
        ids = tokenizer.encode_batch(texts)
        sizes = [len(text.encode()) for text in texts]
        nats, likeliest = 0.0, Counter[int]()
        for numbers in batches(list(map(len, ids))):
            if model is None:
                break
            scores = score_texts(model, [ids[number] for number in numbers], tokenizer.bos_token_id)
            nats -= float(scores.log_probs.double().sum())
            likeliest.update(scores.likeliest.tolist())
            report(sum(sizes[number] for number in numbers))
        figures[language] = Fit(
            num_bytes=sum(sizes),
            num_words=sum(len(_WORDS.findall(text)) for text in texts),
            num_tokens=sum(map(len, ids)),
            nats=None if model is None else nats,
            likeliest=likeliest,
        )
    return figures


def total(figures: Mapping[str, Fit]) -> Fit:
    """The sum over all languages."""
    empty = Fit(num_bytes=0, num_words=0, num_tokens=0, nats=0.0)
    return sum(figures.values(), start=empty)


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts in order, in groups of at most BATCH_TOKENS tokens; a longer text is alone."""
    numbers: list[int] = []
    for number, length in enumerate(lengths):
        if numbers and sum(lengths[other] for other in numbers) + length > BATCH_TOKENS:
            yield numbers
            numbers = []
        numbers.append(number)
    if numbers:
        yield numbers


@torch.inference_mode()
def score_texts(model: BloomForCausalLM, texts: Sequence[Sequence[int]], first_id: int) -> LabelScores:
    """Score the M tokens of some texts, one text after another, each token given those before it.

    Args:
        model: in eval mode.
        texts: ids.
        first_id: the id before the first token of each text.
    """
    device = model.transformer.word_embeddings.weight.device
    given = [[first_id, *ids[:-1]] for ids in texts if ids]
    tokens = torch.tensor([token for ids in given for token in ids], dtype=torch.int64, device=device)
    labels = torch.tensor([token for ids in texts for token in ids], dtype=torch.int64, device=device)
    hidden = model.transformer(tokens, Documents.packed([len(ids) for ids in given]))
    return score_labels(hidden, head_of(model), labels)
