"""lm-eval's tasks wikitext and lambada_openai, number for number.

WikiText: each document is detokenised and encoded by itself, behind the prefix token `<s>`. Windows of max_length
tokens score every token once: the first begins with `<s>`, each further full window with the token before its first
scored one, and the last reaches back so that it is full too. Perplexities are per word and byte of the ORIGINAL
documents.

LAMBADA: the context is all words but the last, the continuation " " and the last word. Scored are the log-probability
of its tokens, and whether each of them is the likeliest one.

Source: lm-evaluation-harness, tasks wikitext 2.0 and lambada_openai 1.0, models/huggingface.py.
"""

import math
import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError
from bloomlm.evaluation.data_sources import (
    Passage,
    detokenize,
    notices_about,
    read_passages,
    read_text,
    split_documents,
)
from bloomlm.evaluation.metrics import Metric, exponential, linear, mean, ratio
from bloomlm.evaluation.protocol import Definition, Protocol, Task, WindowPlan, last_word_plan, running_perplexity
from bloomlm.evaluation.scoring.windows import Tokens, Window, WindowScore

DEFINITION = Definition(
    name="lm_eval",
    version="1",
    source="lm-evaluation-harness 0.4: wikitext 2.0, lambada_openai 1.0",
)
SEQ_LENGTH = 2048
"""lm-eval's max_length for BLOOM."""


def wikitext(text: str, tokenizer: Tokenizer, *, seq_length: int = SEQ_LENGTH, limit: int | None = None) -> WindowPlan:
    """Documents in disjoint windows; the limit counts documents.

    Raises:
        DataError: no document.
    """
    documents = split_documents(text)[:limit]
    encoded = tokenizer.encode_batch([detokenize(document) for document in documents])
    pieces = [rolling_windows(ids, tokenizer.bos_token_id, seq_length) for ids in encoded]
    windows = [window for piece in pieces for window in piece]
    if not windows:
        raise DataError("--eval_path: no tokens in it; expected WikiText's documents")
    owners = np.repeat(np.arange(len(documents)), [len(piece) for piece in pieces])
    num_words = [len(re.split(r"\s+", document)) for document in documents]
    num_bytes = [len(document.encode("utf-8")) for document in documents]
    return WindowPlan(
        definition=DEFINITION,
        task="wikitext",
        settings={"seq_length": seq_length},
        counts={
            "documents": len(documents),
            "original_words": sum(num_words),
            "original_bytes": sum(num_bytes),
            "tokens": sum(map(len, encoded)),
        },
        windows=windows,
        metrics=partial(_perplexities, owners=owners, num_words=num_words, num_bytes=num_bytes),
        running=running_perplexity,
        notices=notices_about(text),
    )


def _perplexities(
    scores: Sequence[WindowScore], *, owners: Tokens, num_words: Sequence[int], num_bytes: Sequence[int]
) -> dict[str, Metric]:
    """Metrics over documents.

    Args:
        scores: scores of the windows of all documents.
        owners: number of the document of each window.
        num_words, num_bytes: size of each document.
    """
    weights = [score.log_prob for score in scores]
    log_probs = np.bincount(owners, weights=weights, minlength=len(num_words)).tolist()
    by_word = ratio(log_probs, num_words, higher_is_better=True)
    by_byte = ratio(log_probs, num_bytes, higher_is_better=True)
    return {
        "word_perplexity": exponential(by_word, scale=-1.0),
        "byte_perplexity": exponential(by_byte, scale=-1.0),
        "bits_per_byte": linear(by_byte, -1.0 / math.log(2.0)),
    }


def rolling_windows(ids: Sequence[int], prefix_token_id: int, max_length: int) -> list[Window]:
    """Windows that score every token once.

        tokens 0 1 2 3 4 5 6 7 8, max_length 4     sees     <s> 0 1 2    3 4 5 6     4 5 6 7
                                                   scores     0 1 2 3    4 5 6 7           8

    Args:
        ids: a document, which may be empty.
        prefix_token_id: token that stands before the document.
        max_length: most tokens of a window.
    """
    tokens = np.array([prefix_token_id, *ids], dtype=np.int64)
    windows = []
    for start in range(0, len(ids), max_length):
        stop = min(start + max_length, len(ids))
        windows.append(Window(tokens[max(0, stop - max_length) : stop], tokens[start + 1 : stop + 1]))
    return windows


def lambada(
    passages: Sequence[Passage], tokenizer: Tokenizer, *, seq_length: int = SEQ_LENGTH, limit: int | None = None
) -> WindowPlan:
    """Last words of passages; a context that is too long is cut at its beginning.

    Raises:
        DataError: a passage whose last word has no token.
    """
    passages = passages[:limit]
    texts = [(" ".join(words[:-1]), f" {words[-1]}") for words in (passage.text.split(" ") for passage in passages)]
    pairs = encode_pairs(texts, tokenizer)
    for passage, (_, word) in zip(passages, pairs, strict=True):
        if not word:
            raise DataError(f"{passage.where}: no token in the last word; expected a passage that ends in a word")

    def metrics(scores: Sequence[WindowScore]) -> dict[str, Metric]:
        log_prob = mean([score.log_prob for score in scores], higher_is_better=True)
        return {
            "acc": mean([float(score.is_greedy) for score in scores], higher_is_better=True),
            "perplexity": exponential(log_prob, scale=-1.0),
        }

    return last_word_plan(DEFINITION, pairs, seq_length, metrics)


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Encode each context together with its continuation, and split the ids.

    Spaces at the end of a context are moved to the continuation, as most tokens begin with their space. An empty
    context becomes the prefix token, unless the continuation begins with that token.
    """
    split = [(context.rstrip(), context[len(context.rstrip()) :] + rest) for context, rest in pairs]
    contexts = tokenizer.encode_batch([context for context, _ in split])
    wholes = tokenizer.encode_batch([context + rest for context, rest in split])
    encoded = []
    for context, whole in zip(contexts, wholes, strict=True):
        if context:
            encoded.append((context, whole[len(context) :]))
        elif whole[:1] == [tokenizer.bos_token_id]:
            encoded.append((whole[:1], whole[1:]))
        else:
            encoded.append(([tokenizer.bos_token_id], whole))
    return encoded


PROTOCOL = Protocol(
    name="lm_eval",
    help="lm-eval's wikitext and lambada_openai",
    tasks=(
        Task(name="wikitext", read=read_text, make_plan=wikitext),
        Task(name="lambada", read=read_passages, make_plan=lambada),
    ),
)
