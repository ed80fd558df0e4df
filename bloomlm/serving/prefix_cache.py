"""Saved keys and values of the beginnings of sequences, so that requests that begin alike are read once.

A block holds the keys and values of 16 successive tokens. Its name is a hash of the adapter and of all tokens up to its
end, because keys and values depend on all of them (the scheme is vLLM's automatic prefix caching,
https://docs.vllm.ai/en/latest/design/prefix_caching.html). SHA-256 makes equal names of different tokens impossible
in practice, so no request can see another one's prefix without having given it.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from bloomlm.serving.scheduler import BLOCK_TOKENS

Block = TypeVar("Block")


def block_names(tokens: Sequence[int], *, origin: bytes, before: Sequence[bytes] = ()) -> list[bytes]:
    """The names of the whole blocks of a sequence.

    Args:
        tokens: the whole sequence.
        origin: what else keys and values depend on: the adapter.
        before: names of the sequence's first blocks, where they are known already.
    """
    names = list(before)
    name = names[-1] if names else hashlib.sha256(origin).digest()
    for start in range(len(names) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        name = hashlib.sha256(name + array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()).digest()
        names.append(name)
    return names


class PrefixCache(Generic[Block]):
    """Blocks by name. Those that have not been used for the longest time leave first."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, names: Sequence[bytes]) -> list[Block]:
        """The saved blocks of a sequence, from its first one up to the first that is missing."""
        found = []
        for name in names:
            if name not in self._blocks:
                break
            found.append(self._blocks[name])
        self._use(names[: len(found)])
        return found

    def save(self, names: Sequence[bytes], start: int, read: Callable[[int], Block], *, most: int) -> None:
        """Save the blocks of a sequence from number `start` on, as far as there is room without its own first blocks.

        Args:
            names: names of all its blocks up to the last one to save.
            start: number of the first block to save.
            read: gives a block by its number; it is called for blocks that are missing.
            most: blocks that the cache may hold.
        """
        self._use(names)
        places = {name: number for number, name in enumerate(names)}
        for number in range(start, len(names)):
            if names[number] not in self._blocks:
                if not self._make_room(most, places, number):
                    break
                self._blocks[names[number]] = read(number)
        self._use(names)

    def shrink(self, most: int) -> None:
        """Drop blocks until at most so many are left."""
        while len(self._blocks) > max(0, most):
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Drop all blocks."""
        self._blocks.clear()

    def _make_room(self, most: int, places: Mapping[bytes, int], number: int) -> bool:
        """Drop old blocks until one more fits, but no earlier block of the sequence that block `number` belongs to."""
        while len(self._blocks) >= most:
            oldest = next(iter(self._blocks), None)
            if oldest is None or places.get(oldest, number) < number:
                return False
            del self._blocks[oldest]
        return True

    def _use(self, names: Sequence[bytes]) -> None:
        # The end of a sequence counts as older than its beginning, without which it cannot be found.
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)
