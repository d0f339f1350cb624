"""A shuffle that needs no memory: a pseudo-random bijection, computed number by number."""

from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_FEWEST_BITS = 6  # with fewer, not every order of a few numbers is as frequent


class Permutation:
    """A bijection of ``range(size)`` that depends on `seed`, a sequence of integers of at least 0, alone.

    An unbalanced Feistel network over the next power of two; a number that falls outside is sent through it
    again (cycle walking), twice on average at most. It has no list of its order, so that a billion sentences
    cost as little as ten.
    """

    def __init__(self, *, size: int, seed: tuple[int, ...]) -> None:
        assert size >= 1
        self._size = size
        bits = max(_FEWEST_BITS, (size - 1).bit_length())
        # After an even number of rounds the two parts, of unequal width, stand where they stood.
        self._widths = (bits // 2, bits - bits // 2)
        self._keys = random_numbers(seed, _ROUNDS)

    def __call__(self, index_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Where each of `index_N`, integers from 0 to below `size`, is sent."""
        number_N = self._network(index_N.astype(np.uint64))
        outside = np.flatnonzero(number_N >= self._size)
        while len(outside):
            number_N[outside] = self._network(number_N[outside])
            outside = outside[number_N[outside] >= self._size]
        return number_N.astype(np.int64)

    def _network(self, number_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left_width, right_width = self._widths
        left_N = number_N >> np.uint64(right_width)
        right_N = number_N & _mask(right_width)
        for key in self._keys:
            left_N, right_N = right_N, left_N ^ (_mixed(right_N ^ key) & _mask(left_width))
            left_width, right_width = right_width, left_width
        return (left_N << np.uint64(right_width)) | right_N


def random_numbers(seed: tuple[int, ...], size: int) -> npt.NDArray[np.uint64]:
    """`size` random 64-bit numbers that depend on `seed` alone, and not on the version of NumPy."""
    return np.random.PCG64(list(seed)).random_raw(size)


def _mask(width: int) -> np.uint64:
    return np.uint64((1 << width) - 1)


def _mixed(number_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    number_N = (number_N ^ (number_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number_N = (number_N ^ (number_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number_N ^ (number_N >> np.uint64(31))
