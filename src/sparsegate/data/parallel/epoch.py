"""Which examples stand together in which batch of an epoch.

Examples are put into buckets of about equal length, once. All that changes from epoch to epoch is which
examples of a bucket are drawn, which of equal length stand together, and the order of the batches. So every
epoch has the same number of batches, and the batch of an index is found without looking at those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

_Integers = npt.NDArray[np.int64]

# A bucket's longest example may be this many times its shortest, where there are enough to fill a batch.
_GROWTH = 1.1
_DRAWS, _TIES, _ORDER = range(3)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One epoch: the examples in the order of the batches that `first_N` cuts, and the order of these.

    pair_N, example_N: the examples. first_N: where each batch begins, and the end of the last. batch_N: the
    batches in the order in which they come.
    """

    pair_N: _Integers
    example_N: _Integers
    first_N: _Integers
    batch_N: _Integers

    def rows(self, number: int) -> tuple[_Integers, _Integers]:
        """Pair and number of each example of one batch."""
        chosen = self.batch_N[number]
        rows = slice(self.first_N[chosen], self.first_N[chosen + 1])
        return self.pair_N[rows], self.example_N[rows]


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """Examples of about equal length: those of each pair, how many of them an epoch draws, and how many rows
    a batch of them may have."""

    members: list[_Integers]
    draws: list[int]
    rows: int

    @property
    def num_batches(self) -> int:
        return -(-sum(self.draws) // self.rows)


class EpochPlan:
    """Draws the plan of any epoch, a pure function of (seed, epoch).

    lengths: for each pair of languages the positions that source and target of its examples take, [N, 2].
    For the rest see `TranslationBatches`.
    """

    def __init__(
        self, *, lengths: Sequence[_Integers], batch_subwords: int, seed: int, temperature: float
    ) -> None:
        self._lengths = list(lengths)
        self._seed = seed
        num_P = np.array([len(length_N2) for length_N2 in lengths], dtype=np.float64)
        weight_P = (num_P / num_P.max()) ** (1 / temperature)
        self.share_P: npt.NDArray[np.float64] = weight_P / weight_P.sum()
        # How often each example of a pair is drawn in an epoch, on average.
        rate_P = self.share_P * num_P.sum() / num_P
        self._buckets = _buckets([length_N2.max(axis=1) for length_N2 in lengths], rate_P, batch_subwords)
        self.num_batches = sum(bucket.num_batches for bucket in self._buckets)

    def plan(self, epoch: int) -> Plan:
        """The plan of one epoch."""
        pairs, examples, ends = [], [], [np.zeros(1, dtype=np.int64)]
        for number, bucket in enumerate(self._buckets):
            pair_N, example_N = self._drawn(bucket, number, epoch)
            batches = bucket.num_batches
            cuts = np.arange(1, batches + 1) * len(pair_N) // batches
            ends.append(cuts + ends[-1][-1])
            pairs.append(pair_N)
            examples.append(example_N)
        order = _random(_ORDER, epoch, 0, 0, self._seed, size=self.num_batches)
        return Plan(
            pair_N=np.concatenate(pairs),
            example_N=np.concatenate(examples),
            first_N=np.concatenate(ends),
            batch_N=np.argsort(order, kind="stable"),
        )

    def _drawn(self, bucket: _Bucket, number: int, epoch: int) -> tuple[_Integers, _Integers]:
        """What an epoch draws from a bucket, by its shape, at random within it."""
        drawn = [
            members[_in_turn(len(members), draws, epoch, key=(pair, number, self._seed))]
            for pair, (members, draws) in enumerate(zip(bucket.members, bucket.draws, strict=True))
        ]
        length_N2 = np.concatenate(
            [pair_N2[some] for pair_N2, some in zip(self._lengths, drawn, strict=True)]
        )
        class_N, within_N = _by_shape(length_N2)
        tie_N = _random(_TIES, epoch, number, 0, self._seed, size=len(length_N2))
        order_N = np.lexsort((tie_N, within_N, class_N))
        pair_N = np.repeat(np.arange(len(drawn)), bucket.draws)
        return pair_N[order_N], np.concatenate(drawn)[order_N]


def _by_shape(length_N2: _Integers) -> tuple[_Integers, _Integers]:
    """What brings pairs together of which both sides are of about equal length: the class of the longer side,
    then by eighths how much longer the source is, up and down by turns, so that neighbours stay alike from
    class to class."""
    size_N = length_N2.max(axis=1)
    start_C = [1]
    while start_C[-1] <= size_N.max():
        start_C.append(int(start_C[-1] * _GROWTH) + 1)
    class_N = np.searchsorted(start_C, size_N, side="right")
    eighths_N = (length_N2[:, 0] - length_N2[:, 1]) * 8 // size_N
    return class_N, eighths_N * np.where(class_N % 2, 1, -1)


def _in_turn(num: int, draws: int, epoch: int, *, key: tuple[int, int, int]) -> _Integers:
    """The `draws` of `num` that are an epoch's turn in an endless row of permutations."""
    if num == 0:
        return np.zeros(0, dtype=np.int64)
    first, last = epoch * draws, (epoch + 1) * draws
    pair, bucket, seed = key
    rounds = [
        np.argsort(_random(_DRAWS, turn, bucket, pair, seed, size=num), kind="stable")
        for turn in range(first // num, -(-last // num))
    ]
    skipped = first // num * num
    return np.concatenate(rounds)[first - skipped : last - skipped]


def _buckets(sizes: Sequence[_Integers], rate_P: npt.NDArray[np.float64], budget: int) -> list[_Bucket]:
    """The buckets for examples of the given sizes (the longer side), from the shortest."""
    drawn_L = np.zeros(max(int(size_N.max()) for size_N in sizes) + 1)
    for size_N, rate in zip(sizes, rate_P, strict=True):
        drawn_L += rate * np.bincount(size_N, minlength=len(drawn_L))
    end_N = np.array(_bucket_ends(drawn_L, budget))
    chosen = [np.searchsorted(end_N, size_N) for size_N in sizes]
    sorted_by_bucket = [np.argsort(bucket_N, kind="stable") for bucket_N in chosen]
    first = [np.searchsorted(np.sort(bucket_N), np.arange(len(end_N) + 1)) for bucket_N in chosen]
    buckets = []
    for number, longest in enumerate(end_N.tolist()):
        members = [
            order_N[first_N[number] : first_N[number + 1]]
            for order_N, first_N in zip(sorted_by_bucket, first, strict=True)
        ]
        # Rounded up, so that no example is left out for ever; but not what arithmetic adds to a whole number.
        draws = [
            int(np.ceil(len(some) * rate * (1 - 1e-9))) for some, rate in zip(members, rate_P, strict=True)
        ]
        buckets.append(_Bucket(members=members, draws=draws, rows=max(1, budget // longest)))
    return buckets


def _bucket_ends(drawn_L: npt.NDArray[np.float64], budget: int) -> list[int]:
    """The longest size of each bucket; `drawn_L` says how many examples of each size an epoch has."""
    present = np.flatnonzero(drawn_L).tolist()
    ends: list[int] = []
    shortest, drawn = present[0], 0.0
    for size, following in pairwise(present):
        drawn += drawn_L[size]
        fills_a_batch = drawn * size >= budget
        if (following > _GROWTH * shortest and fills_a_batch) or size <= budget < following:
            ends.append(size)
            shortest, drawn = following, 0.0
    return [*ends, present[-1]]


def _random(*key: int, size: int) -> npt.NDArray[np.uint64]:
    """`size` random 64-bit numbers that depend on the key alone, and not on the version of NumPy."""
    return np.random.PCG64(list(key)).random_raw(size)
