"""A shuffled order of any length that needs no memory: the place of each index is computed when it is asked for.

A Feistel network permutes the numbers of 2k bits: each round exchanges their halves and mixes one into the other. The
smallest such range that holds all indices is permuted, and an index whose image lies outside of them goes on to the
image of that, until it lies inside. Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 4.
"""

import numpy as np

_ROUNDS = 6
_MASK = 2**64 - 1


class Permutation:
    """A permutation of 0 to length - 1.

    Args:
        length: at least 1.
        seed: non-negative numbers, which choose the permutation.
    """

    def __init__(self, length: int, *seed: int) -> None:
        self._length = length
        self._half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
        self._half_mask = 2**self._half_bits - 1
        # numpy promises that a SeedSequence stays the same from version to version
        self._keys: list[int] = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64).tolist()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        """The number at a place of the order."""
        assert 0 <= index < self._length
        value = self._image(index)
        while value >= self._length:
            value = self._image(value)
        return value

    def _image(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def _mixed(value: int) -> int:
    """All bits of a 64-bit number mixed. Source: the finalizer of SplitMix64, Steele, Lea and Flood, 2014."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
