import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data.permutation import Permutation, random_numbers


def order(size: int, *seed: int) -> list[int]:
    return Permutation(size=size, seed=seed)(np.arange(size)).tolist()


@given(size=st.integers(1, 3000), seed=st.tuples(st.integers(0, 2**63), st.integers(0, 9)))
def test_it_is_a_bijection(size: int, seed: tuple[int, int]) -> None:
    assert sorted(order(size, *seed)) == list(range(size))


def test_sizes_about_powers_of_two_are_bijections() -> None:
    for size in (255, 256, 257, 511, 512, 513, 65_535, 65_536, 65_537):
        assert sorted(order(size, 1)) == list(range(size))


def test_numbers_are_sent_alike_alone_and_together() -> None:
    permutation = Permutation(size=1000, seed=(3, 4))
    together = permutation(np.arange(1000))
    assert [int(permutation(np.array([number]))[0]) for number in range(1000)] == together.tolist()


def test_the_inside_of_a_huge_range_stays_inside_and_apart() -> None:
    size = 10**12 + 39
    sent = Permutation(size=size, seed=(0,))(np.arange(size - 100_000, size))
    assert 0 <= sent.min() <= sent.max() < size
    assert len(np.unique(sent)) == 100_000


def test_it_is_that_of_a_plain_loop() -> None:
    """The network and the walk, in Python's integers."""
    size, bits = 5000, 13
    keys = [int(key) for key in np.random.PCG64([7, 8]).random_raw(6)]

    def mixed(number: int) -> int:
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    def network(number: int) -> int:
        widths = itertools.cycle([bits // 2, bits - bits // 2])
        left, right = number >> (bits - bits // 2), number % 2 ** (bits - bits // 2)
        for key in keys:
            left, right = right, left ^ mixed(right ^ key) % 2 ** next(widths)
        return (left << (bits - bits // 2)) | right

    expected = []
    for number in range(size):
        number = network(number)
        while number >= size:
            number = network(number)
        expected.append(number)
    assert order(size, 7, 8) == expected


def test_every_order_of_few_is_about_as_frequent() -> None:
    """Chi-square over the 24 orders of 4, 23 degrees of freedom: 49.7 is the 99.9th percentile."""
    draws = 1200
    counts = Counter(tuple(order(4, 0, epoch)) for epoch in range(draws))
    expected = draws / 24
    assert len(counts) == 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 49.7


def test_neighbours_are_sent_apart() -> None:
    """The steps of a random order of n have the mean (n + 1) / 3, and those of another seed are others."""
    size = 10_000
    one, other = np.array(order(size, 1)), np.array(order(size, 2))
    assert abs(np.abs(np.diff(one)).mean() / ((size + 1) / 3) - 1) < 0.03
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.05


def test_orders_are_drawn_from_numbers_that_no_version_of_numpy_changes() -> None:
    """NumPy promises the raw numbers of a bit generator, not what its distributions make of them."""
    assert random_numbers((0, 1), 2).tolist() == [16412783775159424549, 10277383025879800780]
