"""Intervals contain the truth about as often as they say."""

import numpy as np
import pytest

from sparsegate.recipes.study.intervals import over_pieces, over_seeds


@pytest.mark.parametrize("number", [2, 3, 6, 16])
def test_an_interval_over_seeds_contains_the_mean_of_all_seeds_in_95_of_100_studies(number: int):
    draws = np.random.default_rng(1).normal(7.0, 0.3, size=(2000, number))
    intervals = [over_seeds(list(values)) for values in draws]
    share = np.mean([i.low <= 7.0 <= i.high for i in intervals])
    assert 0.935 < share < 0.965
    assert {i.over for i in intervals} == {"seeds"}


def test_an_interval_over_pieces_contains_the_rate_of_the_language_in_about_95_of_100_tests():
    random = np.random.default_rng(2)
    inside = 0
    for _ in range(300):
        tokens_P = random.integers(900, 1100, size=50)
        nll_P = tokens_P * random.normal(5.0, 0.2, size=50)
        interval = over_pieces(list(nll_P), list(tokens_P))
        assert interval.mean == pytest.approx(nll_P.sum() / tokens_P.sum())
        inside += interval.low <= 5.0 <= interval.high
    assert 0.90 <= inside / 300 <= 0.98


def test_the_bootstrap_is_the_same_every_time():
    pieces = ([3.0, 5.0, 4.0], [1, 2, 1])
    assert over_pieces(*pieces) == over_pieces(*pieces)
