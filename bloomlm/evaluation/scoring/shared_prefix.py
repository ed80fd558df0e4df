"""Computes the common beginning of windows once.

There are two cases, both exact. A window that is the beginning of another window, or equal to it, is scored from the
hidden states of the other one. Windows that begin alike and then differ share the keys and values of one prefill. The
possible answers to one question begin alike, and so do questions that follow the same examples.

Shapes: M scored tokens of a batch, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bloomlm.evaluation.scoring.windows import Tokens, Window
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents

_FEWEST_SHARED = 16
"""A separate prefill of a shorter common beginning would cost more than it saves."""


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens to compute, and the windows that are scored from their hidden states."""

    tokens: Tokens
    windows: tuple[int, ...]
    """Numbers of the windows that consist of these tokens or of their beginning."""


@dataclass(frozen=True, eq=False)
class Branches:
    """Documents with the same first num_shared tokens; a single document shares none."""

    documents: tuple[Document, ...]
    num_shared: int = 0

    @property
    def longest_rest(self) -> int:
        """Tokens of the longest document after the common beginning."""
        return max(len(document.tokens) for document in self.documents) - self.num_shared

    @property
    def num_computed(self) -> int:
        """Tokens that go through the blocks, pads included."""
        return self.num_shared + len(self.documents) * self.longest_rest

    def halves(self) -> Sequence["Branches"]:
        """The documents in two groups, for a retry with less memory; a single document stays as it is."""
        if len(self.documents) == 1:
            return (self,)
        middle = len(self.documents) // 2
        return Branches(self.documents[:middle], self.num_shared), Branches(self.documents[middle:], self.num_shared)


@dataclass(frozen=True, eq=False)
class Placed:
    """A document, and the rows of the hidden states where its tokens are."""

    document: Document
    num_shared: int
    shared_row: int
    """Row of its first token; the other shared tokens follow."""
    own_row: int
    """Row of its first token after the shared ones."""

    def rows(self, positions: Tokens) -> Tokens:
        """Rows of the document's tokens at the given positions."""
        shared = positions < self.num_shared
        return np.where(shared, self.shared_row + positions, self.own_row + positions - self.num_shared)


def join_documents(windows: Sequence[Window], numbers: Sequence[int]) -> list[Document]:
    """The documents that score the windows, in the order of their tokens."""
    # Big-endian bytes sort as the tokens do, so windows that begin with another window's tokens follow right after it.
    keys = {number: windows[number].tokens.astype(">u4").tobytes() for number in numbers}
    documents: list[Document] = []
    longer = b""
    for number in sorted(numbers, key=keys.__getitem__, reverse=True):
        if documents and longer.startswith(keys[number]):
            last = documents.pop()
            documents.append(Document(last.tokens, (*last.windows, number)))
        else:
            longer = keys[number]
            documents.append(Document(windows[number].tokens, (number,)))
    return documents[::-1]


def find_branches(documents: Sequence[Document], max_slots: int) -> list[Branches]:
    """Group documents that share at least half of their tokens.

    Args:
        documents: in the order of join_documents.
        max_slots: most tokens in memory for one group, see num_slots.
    """
    groups: list[Branches] = []
    for document in documents:
        if groups:
            last = groups[-1]
            shared = _num_common(last, document)
            longer = Branches((*last.documents, document), shared)
            shares_half = 2 * shared >= max(len(d.tokens) for d in (last.documents[0], document))
            if shared >= _FEWEST_SHARED and shares_half and num_slots([longer]) <= max_slots and _saves(last, longer):
                groups[-1] = longer
                continue
        groups.append(Branches((document,)))
    return groups


class Packed:
    """A batch of whole documents, one after another without pads."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._lengths = [len(document.tokens) for document in documents]
        self._tokens = np.concatenate([document.tokens for document in documents])
        self.num_tokens = len(self._tokens)
        """Tokens that go through the blocks."""
        starts = np.cumsum([0, *self._lengths]).tolist()
        self.placed = [Placed(d, 0, start, start) for d, start in zip(documents, starts[:-1], strict=True)]
        """Where each document's hidden states are."""

    def hidden(self, model: BloomForCausalLM, rows: Tensor) -> Tensor:
        """The hidden states [M, D] of some rows [M]."""
        tokens = torch.from_numpy(self._tokens).to(rows.device)
        out: Tensor = model.transformer(tokens, Documents.packed(self._lengths), rows=rows)
        return out


class Branched:
    """A batch of groups: the common beginnings, packed, then the rest of each document, padded to one length."""

    def __init__(self, groups: Sequence[Branches]) -> None:
        self._lengths = [group.num_shared for group in groups]
        self._beginnings = np.concatenate([group.documents[0].tokens[: group.num_shared] for group in groups])
        self._owners = [number for number, group in enumerate(groups) for _ in group.documents]
        longest_rest = max(group.longest_rest for group in groups)
        # pads come last, where no token attends to them
        self._rests = np.zeros((len(self._owners), longest_rest), dtype=np.int64)
        self.num_tokens = len(self._beginnings) + self._rests.size
        """Tokens that go through the blocks, pads included."""
        self.placed: list[Placed] = []
        """Where each document's hidden states are."""
        starts = np.cumsum([0, *self._lengths]).tolist()
        for start, group in zip(starts[:-1], groups, strict=True):
            for document in group.documents:
                row = len(self.placed)
                rest = document.tokens[group.num_shared :]
                self._rests[row, : len(rest)] = rest
                own_row = len(self._beginnings) + row * longest_rest
                self.placed.append(Placed(document, group.num_shared, start, own_row))

    def hidden(self, model: BloomForCausalLM, rows: Tensor) -> Tensor:
        """The hidden states [M, D] of some rows [M]."""
        cache = model.open_rows(len(self._owners), max(self._lengths) + self._rests.shape[1]).cache
        firsts = [self._owners.index(group) for group in range(len(self._lengths))]
        beginnings = torch.from_numpy(self._beginnings).to(rows.device)
        is_shared = rows < len(beginnings)
        extension = cache.extend(firsts, self._lengths)
        shared = model.transformer(beginnings, Documents.packed(self._lengths), extension, rows=rows[is_shared])
        for row, group in enumerate(self._owners):
            if row != firsts[group]:
                cache.copy_row(firsts[group], row)
        rests = torch.from_numpy(self._rests).to(rows.device)
        own_rows = rows[~is_shared] - len(beginnings)
        documents = Documents.equal(*rests.shape)
        extension = cache.extend(range(len(rests)), documents.lengths)
        own = model.transformer(rests.flatten(), documents, extension, rows=own_rows)
        out: Tensor = own.new_empty(len(rows), own.shape[1])
        out[is_shared], out[~is_shared] = shared, own
        return out


def num_slots(groups: Sequence[Branches]) -> int:
    """Tokens in memory when groups are computed together; either all of them have a common beginning, or none.

    A common beginning is copied for every document of its group, and then all documents are padded to one length.
    """
    if groups[0].num_shared == 0:
        return sum(group.longest_rest for group in groups)
    longest = max(group.num_shared for group in groups) + max(group.longest_rest for group in groups)
    return longest * sum(len(group.documents) for group in groups)


def _num_common(group: Branches, document: Document) -> int:
    first = group.documents[0].tokens
    limit = min(len(first), len(document.tokens), group.num_shared or len(first))
    differ = np.flatnonzero(first[:limit] != document.tokens[:limit])
    return int(differ[0]) if len(differ) else limit


def _saves(group: Branches, longer: Branches) -> bool:
    """Whether the longer group computes fewer tokens than the group and the new document separately."""
    return longer.num_computed < group.num_computed + len(longer.documents[-1].tokens)
