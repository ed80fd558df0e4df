"""New merges of a byte-level BPE vocabulary, learned from texts and put behind the old ones.

The `tokenizers` library learns a vocabulary from characters and cannot continue one. So each old token is written as a
character of its own: a text becomes its old tokens, words apart as the pre-tokenizer cuts them, and what the library
learns of such texts are merges of old tokens.

Why old tokenizations change only where a new merge acts. BPE applies the best merge first, and all old ones are better
than the new ones. So a word first becomes its old tokens, exactly as before. A new merge builds a token that did not
exist, of which no old merge is a part; so after it only new merges can act. A word in which no two neighbouring old
tokens are the parts of a new merge keeps its ids.

A learned merge whose result is a token already, old or new, is therefore left out: an old merge could act on its
result, and each new token shall be built in one way.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError
from bloomlm.vocabulary.selection import Vocabulary

FEWEST_OCCURRENCES = 2
"""Of a pair that is merged."""
_FIRST_CHARACTER = 0x20000
"""Old token 0 as a character; no surrogates and no white space follow."""
_BATCH_TEXTS = 512


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """A token that a new merge builds; its id is given by its place among the new ones."""

    left: str
    """In the alphabet of tokenizer.json, as `right`."""
    right: str
    pieces: tuple[int, ...]
    """Ids of the old tokens that it replaces, in order."""


def learn_merges(
    texts: Iterable[str], tokenizer: Tokenizer, vocabulary: Vocabulary, num_tokens: int
) -> tuple[NewToken, ...]:
    """Learn new tokens from texts.

    Args:
        texts: read once, in order.
        tokenizer: the old one.
        vocabulary: of the old tokenizer.
        num_tokens: how many to learn.

    Returns:
        The tokens in the order of their merges.

    Raises:
        DataError: the texts do not have so many pairs of tokens that occur twice.
    """
    backend = Backend(BPE())
    backend.pre_tokenizer = Split("\n", "removed")
    trainer = BpeTrainer(
        # some merges are left out, so more are learned than needed
        vocab_size=vocabulary.num_ids + 2 * num_tokens + 64,
        min_frequency=FEWEST_OCCURRENCES,
        special_tokens=[],
        initial_alphabet=[_character(token) for token in range(vocabulary.num_ids)],
        show_progress=False,
    )
    backend.train_from_iterator(_as_characters(texts, tokenizer), trainer)
    names = {token_id: token for token, token_id in vocabulary.ids.items()}
    known, new = set(vocabulary.ids), list[NewToken]()
    for left, right in json.loads(backend.to_str())["model"]["merges"]:
        token = NewToken(left=_name(left, names), right=_name(right, names), pieces=_ids(left + right))
        if token.left + token.right not in known and len(new) < num_tokens:
            known.add(token.left + token.right)
            new.append(token)
    if len(new) < num_tokens:
        raise DataError(
            f"the corpus gives only {len(new)} new tokens that occur {FEWEST_OCCURRENCES} times in it, and "
            f"{num_tokens} are to be added; name more text, or add fewer"
        )
    return tuple(new)


def extended_json(content: Mapping[str, object], first_id: int, new: Sequence[NewToken]) -> bytes:
    """A tokenizer.json with new tokens.

    Args:
        content: the old one's.
        first_id: of the first new token; the others follow.
        new: the tokens.
    """
    model = dict(content["model"])  # type: ignore[call-overload]
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    merges = [f"{token.left} {token.right}" if as_text else [token.left, token.right] for token in new]
    ids = {token.left + token.right: first_id + number for number, token in enumerate(new)}
    model |= {"vocab": {**model["vocab"], **ids}, "merges": [*model["merges"], *merges]}
    return json.dumps({**content, "model": model}, ensure_ascii=False).encode("utf-8")


class WordEncoder:
    """Encodes texts word by word, as the pre-tokenizer cuts them; no token reaches over two words.

    Args:
        tokenizer: whose tokens they become.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = Backend.from_str(tokenizer.json.decode("utf-8"))
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Text -> word -> ids."""
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        tokens = (zip(text.word_ids, text.ids, strict=True) for text in found)
        return [[[token for _, token in word] for _, word in groupby(text, itemgetter(0))] for text in tokens]


def _as_characters(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[str]:
    """The words of some texts at a time, one a line, each old token a character."""
    remaining, encode = iter(texts), WordEncoder(tokenizer)
    while batch := list(islice(remaining, _BATCH_TEXTS)):
        words = (word for text in encode(batch) for word in text)
        yield "\n".join("".join(map(_character, word)) for word in words if len(word) > 1)


def _character(token: int) -> str:
    return chr(_FIRST_CHARACTER + token)


def _ids(characters: str) -> tuple[int, ...]:
    return tuple(ord(character) - _FIRST_CHARACTER for character in characters)


def _name(characters: str, names: Mapping[int, str]) -> str:
    return "".join(names[token] for token in _ids(characters))
