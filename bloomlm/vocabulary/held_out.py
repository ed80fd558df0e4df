"""A share of a corpus that is not used but measured on, and the first pieces of a corpus."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from bloomlm.data.corpus import Corpus, Piece

HELD_OUT_SHARE = 16
"""One text in so many is held out, until there are enough bytes."""


@dataclass
class HeldOut:
    """Takes some pieces out of a corpus, chosen by a digest of their text, so that a repeated text is taken as one.

    Args:
        bytes_per_language: how much to take of each language at most.
    """

    bytes_per_language: int
    pieces: list[Piece] = field(default_factory=list)
    """What has been taken so far."""

    def rest(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces that stay."""
        taken: dict[str, int] = {}
        for piece in pieces:
            encoded = piece.text.encode()
            num_bytes = taken.get(piece.language, 0) + len(encoded)
            if zlib.crc32(encoded) % HELD_OUT_SHARE or num_bytes > self.bytes_per_language:
                yield piece
            else:
                taken[piece.language] = num_bytes
                self.pieces.append(piece)


def first_pieces(corpus: Corpus, bytes_per_language: int) -> list[Piece]:
    """The first pieces of each language, up to a number of bytes."""
    pieces, taken = list[Piece](), dict[str, int]()
    for piece in corpus.pieces():
        taken[piece.language] = taken.get(piece.language, 0) + len(piece.text.encode())
        if taken[piece.language] <= bytes_per_language:
            pieces.append(piece)
    return pieces
