"""How well a tokenizer and a model fit texts: tokens per word, and bits per byte.

Both compare vocabularies fairly: words and bytes are of the text, whatever its tokens are. Each text is scored from
its first token on, after the token that begins a text, so all of its bytes count.

Shapes: M tokens of a batch, D hidden.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.parallel.vocabulary_scores import score_labels
from bloomlm.vocabulary.corpus import Piece, Report

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
        )


def measure(
    pieces: Iterable[Piece], tokenizer: Tokenizer, model: BloomForCausalLM | None, report: Report = lambda num: None
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
        nats = None if model is None else 0.0
        if model is not None:
            for numbers in batches([len(tokens) + 1 for tokens in ids]):
                log_probs = token_log_probs(model, [ids[number] for number in numbers], first_token(tokenizer))
                nats = (nats or 0.0) - float(log_probs.double().sum())
                report(sum(sizes[number] for number in numbers))
        figures[language] = Fit(
            num_bytes=sum(sizes),
            num_words=sum(len(_WORDS.findall(text)) for text in texts),
            num_tokens=sum(map(len, ids)),
            nats=nats,
        )
    return figures


def total(figures: Mapping[str, Fit]) -> Fit:
    """The sum over all languages."""
    empty = Fit(num_bytes=0, num_words=0, num_tokens=0, nats=0.0)
    return sum(figures.values(), start=empty)


def first_token(tokenizer: Tokenizer) -> int:
    """The id before a text's first token."""
    return tokenizer.bos_token_id


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
def hidden_states(model: BloomForCausalLM, texts: Sequence[Sequence[int]], first_id: int) -> Tensor:
    """[M, D] hidden states from which the M tokens of the texts are predicted, one text after another."""
    weight = model.transformer.word_embeddings.weight
    given = [[first_id, *ids[:-1]] for ids in texts if ids]
    tokens = torch.tensor([token for ids in given for token in ids], device=weight.device)
    return model.transformer(tokens, Documents.packed([len(ids) for ids in given]))


def token_log_probs(model: BloomForCausalLM, texts: Sequence[Sequence[int]], first_id: int) -> Tensor:
    """[M] natural logarithms of the probabilities of the texts' tokens, each given those before it."""
    embedding = model.transformer.word_embeddings
    labels = torch.tensor([token for ids in texts for token in ids], device=embedding.weight.device)
    if not len(labels):
        return torch.zeros(0)
    hidden = hidden_states(model, texts, first_id)
    return score_labels(hidden, embedding.weight, labels, weight_scale=embedding.weight_scale).log_probs
