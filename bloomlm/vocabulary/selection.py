"""Which tokens of a byte-level BPE vocabulary stay, and the tokenizer.json of those.

Kept are the special and other added tokens, all 256 bytes, every token that the corpus uses often enough, and for each
kept token the two parts of every merge that builds it (its ancestors). Merges stay in their order; those whose parts
and result are all kept remain.

Why a text whose tokens are all kept is encoded to the same tokens. BPE starts from the bytes of a word and applies, as
long as there is one, the best merge (the earliest of the list, leftmost first) that two neighbours allow. Run both
vocabularies side by side on a word whose final tokens in the whole vocabulary are all kept:
1. Every merge that the whole vocabulary applies builds a token that ends up in a final token: it is that token or one
   of its ancestors. So its result and its parts are kept, and the merge remains.
2. Before each step both have the same tokens, by induction. The remaining merges are some of the whole vocabulary's
   in the same order, and by 1 its best one is among them: so it is the best here too, and both apply it.
3. Where no merge of the whole vocabulary applies any more, none of the remaining merges does.
A removed merge can therefore change only words that had a removed token; those usually become more, shorter tokens. All
bytes are kept, so that any text is still encoded, and decoded to itself.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomlm.data.corpus import Piece
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError

Ids = NDArray[np.int64]
_BATCH_PIECES = 1024
_NEVER = 2.0
"""Rank of a token that the corpus does not use; above every coverage."""


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says of its tokens."""

    content: Mapping[str, Any]
    """The file."""
    ids: Mapping[str, int]
    """Token -> id, added tokens included."""
    parts: Mapping[int, frozenset[int]]
    """Id -> the parts of all merges that build this token."""
    required: frozenset[int]
    """Tokens that always stay: special and added ones, and the bytes."""

    @property
    def num_ids(self) -> int:
        """The highest id and one."""
        return max(self.ids.values()) + 1


def read_vocabulary(tokenizer: Tokenizer, named: Iterable[int | None] = ()) -> Vocabulary:
    """Read a tokenizer's vocabulary.

    Args:
        tokenizer: of the whole model.
        named: ids that config.json names, whose tokens always stay.

    Raises:
        CheckpointError: it is not byte-level BPE as BLOOM's is.
    """
    content = json.loads(tokenizer.json)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not tokenizer.has_byte_decoder:
        raise CheckpointError(f"{tokenizer.name}: its tokenizer is not byte-level BPE, as BLOOM's is")
    processors = content.get("post_processor") or {}
    kinds = {step.get("type") for step in processors.get("processors", [processors])} - {None, "ByteLevel"}
    if kinds:
        raise CheckpointError(
            f"{tokenizer.name}: its post-processor ({', '.join(sorted(kinds))}) adds tokens by their ids, which would "
            "change; expected none, or ByteLevel"
        )
    ids = {**model["vocab"], **{entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}}
    parts: dict[int, frozenset[int]] = {}
    for left, right in map(_pair, model["merges"]):
        result = ids[left + right]
        parts[result] = parts.get(result, frozenset()) | {ids[left], ids[right]}
    added = {entry["id"] for entry in content.get("added_tokens") or []}
    special = {token_id for token_id in ids.values() if tokenizer.is_special(token_id)}
    alphabet = {token_id for token, token_id in ids.items() if len(token) == 1 and token_id not in added}
    if len({tokenizer.token_bytes(token_id) for token_id in alphabet}) < 256:
        raise CheckpointError(f"{tokenizer.name}: its vocabulary lacks some of the 256 bytes")
    required = added | special | alphabet | (set(ids.values()) & set(named))
    return Vocabulary(content=content, ids=ids, parts=parts, required=frozenset(required))


def count_tokens(pieces: Iterable[Piece], tokenizer: Tokenizer, num_ids: int) -> dict[str, Ids]:
    """How often each token occurs in the texts of each language.

    Args:
        pieces: the texts; some are encoded at a time, on all cores.
        tokenizer: encodes them.
        num_ids: length of the arrays.
    """
    counts: dict[str, Ids] = {}
    for group in _groups(pieces):
        for piece, ids in zip(group, tokenizer.encode_batch([piece.text for piece in group]), strict=True):
            found = counts.setdefault(piece.language, np.zeros(num_ids, dtype=np.int64))
            np.add.at(found, np.array(ids, dtype=np.int64), 1)
    return counts


def rank_tokens(counts: Sequence[Ids]) -> NDArray[np.float64]:
    """The coverage above which each token is needed, the lowest over all languages.

    A language's tokens are taken from the most frequent down; a token's coverage is the share of the language's text
    that those before it have. To cover a share of every language, keep all tokens of a lower rank.

    Args:
        counts: of each language, [V].

    Returns:
        [V] ranks from 0 to below 1, and above 1 for tokens that do not occur.
    """
    ranks = np.full(len(counts[0]), _NEVER)
    for found in counts:
        order = np.argsort(-found, kind="stable")
        before = np.cumsum(found[order]) - found[order]
        own = np.full(len(found), _NEVER)
        own[order] = np.where(found[order] > 0, before / max(1, found.sum()), _NEVER)
        ranks = np.minimum(ranks, own)
    return ranks


def select_tokens(
    vocabulary: Vocabulary, ranks: NDArray[np.float64], *, num_tokens: int | None = None, coverage: float = 1.0
) -> Ids:
    """The ids to keep, ascending.

    Args:
        vocabulary: all tokens.
        ranks: what rank_tokens gives.
        num_tokens: how many to keep in all; where the corpus uses fewer, the lowest other ids follow.
        coverage: without num_tokens: share of every language's token occurrences to keep at least.

    Raises:
        ConfigError: num_tokens is less than must be kept, or more than there are.
    """
    if num_tokens is not None and not len(vocabulary.required) <= num_tokens <= len(vocabulary.ids):
        raise ConfigError(
            f"{num_tokens} tokens cannot be kept: the vocabulary has {len(vocabulary.ids)}, of which "
            f"{len(vocabulary.required)} always stay (special and added tokens and the bytes)"
        )
    existing = set(vocabulary.ids.values())
    kept = _with_ancestors(vocabulary, vocabulary.required, set())
    for token_id in np.argsort(ranks, kind="stable").tolist():
        if num_tokens is None and ranks[token_id] >= coverage:
            break
        if token_id in existing and token_id not in kept:
            more = _with_ancestors(vocabulary, {token_id}, kept)
            if num_tokens is None or len(kept) + len(more) <= num_tokens:
                kept |= more
            if len(kept) == num_tokens:
                break
    return np.array(sorted(kept), dtype=np.int64)


def trim_json(vocabulary: Vocabulary, kept: Ids) -> bytes:
    """The tokenizer.json of the kept tokens, whose ids are their places in `kept`."""
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    content, model = vocabulary.content, vocabulary.content["model"]
    ids = vocabulary.ids
    merges = [
        merge
        for merge in model["merges"]
        for left, right in (_pair(merge),)
        if {ids[left], ids[right], ids[left + right]} <= new_ids.keys()
    ]
    trimmed = {
        **content,
        "added_tokens": [{**entry, "id": new_ids[entry["id"]]} for entry in content.get("added_tokens") or []],
        "model": {
            **model,
            "vocab": {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids},
            "merges": merges,
        },
    }
    return json.dumps(trimmed, ensure_ascii=False).encode("utf-8")


def _with_ancestors(vocabulary: Vocabulary, tokens: Iterable[int], kept: set[int]) -> set[int]:
    """The tokens and all their ancestors that are not kept already."""
    found: set[int] = set()
    waiting = list(tokens)
    while waiting:
        token_id = waiting.pop()
        if token_id not in found and token_id not in kept:
            found.add(token_id)
            waiting += vocabulary.parts.get(token_id, ())
    return found


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _groups(pieces: Iterable[Piece]) -> Iterable[list[Piece]]:
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == _BATCH_PIECES:
            yield group
            group = []
    if group:
        yield group
