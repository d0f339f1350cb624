import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.decoding.choice import Sampling, choose, restrict


def draws(num_rows, seed=0):
    return [np.random.PCG64([seed, row]) for row in range(num_rows)]


def kept(logits, **options):
    """The set of tokens that can be drawn."""
    return set(np.flatnonzero(restrict(np.array([logits]), **options)[0] > -np.inf).tolist())


def softmax(logits):
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


distinct_logits = st.lists(
    st.floats(-8, 8, allow_nan=False), min_size=1, max_size=20, unique_by=lambda x: round(x, 2)
)


@given(logits=distinct_logits, k=st.integers(1, 25))
def test_top_k_keeps_the_k_largest(logits, k):
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    assert kept(logits, temperature=1.0, top_k=k, top_p=None) == set(order[:k])


@given(logits=distinct_logits, p=st.floats(0.01, 1.0), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_top_p_keeps_the_fewest_most_probable_that_reach_p(logits, p, temperature):
    probabilities = softmax([logit / temperature for logit in logits])
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    sums = np.cumsum([probabilities[token] for token in order])
    if np.abs(sums - p).min() > 1e-9:
        expected = order[: int((sums < p).sum()) + 1]
        assert kept(logits, temperature=temperature, top_k=None, top_p=p) == set(expected)


def test_top_p_counts_the_probabilities_that_top_k_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert kept(logits, temperature=1.0, top_k=2, top_p=0.56) == {0}
    assert kept(logits, temperature=1.0, top_k=2, top_p=0.58) == {0, 1}


def test_the_most_probable_token_stays_however_small_top_p_is():
    assert kept([1.0, 3.0, 2.0], temperature=1.0, top_k=None, top_p=1e-300) == {1}


def test_equally_probable_tokens_stay_together():
    logits = [1.0, 2.0, 1.0, 1.0, 0.0]
    assert kept(logits, temperature=1.0, top_k=2, top_p=None) == {0, 1, 2, 3}
    assert kept(logits, temperature=1.0, top_k=None, top_p=0.5) == {0, 1, 2, 3}


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def count_choices(logits, sampling, *, num_rows):
    logits_BV = torch.tensor(logits).expand(num_rows, -1)
    tokens = choose(logits_BV, sampling=sampling, draws=draws(num_rows), never=None)
    return np.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_softmax_probability_says(temperature):
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0]
    counts = count_choices(logits, Sampling(temperature=temperature), num_rows=10_000)
    probabilities = np.array(softmax([logit / temperature for logit in logits]))
    # The 99.9 % point of the chi-square distribution with 7 degrees of freedom.
    assert chi_square(counts, probabilities) < 24.3


def test_tokens_under_top_k_and_top_p_are_drawn_as_often_as_their_renormalised_probability_says():
    probabilities = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    counts = count_choices(np.log(probabilities).tolist(), Sampling(top_k=4, top_p=0.85), num_rows=10_000)
    left = np.array([1, 3, 4])
    assert counts[[0, 2]].sum() == 0
    # As above, with 2 degrees of freedom.
    assert chi_square(counts[left], probabilities[left] / probabilities[left].sum()) < 13.8


def test_the_draws_of_one_row_are_independent_from_token_to_token():
    row_draws = draws(1)
    tokens = [
        choose(torch.zeros(1, 2), sampling=Sampling(), draws=row_draws, never=None)[0] for _ in range(4000)
    ]
    pairs = np.bincount(2 * np.array(tokens[:-1]) + np.array(tokens[1:]), minlength=4)
    assert chi_square(pairs, np.full(4, 0.25)) < 16.3


def test_temperature_zero_takes_the_first_of_the_most_probable():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]])
    assert choose(logits, sampling=Sampling(temperature=0.0), draws=draws(2), never=None) == [1, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_a_temperature_next_to_zero_takes_the_most_probable(temperature):
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]])
    assert choose(logits, sampling=Sampling(temperature=temperature), draws=draws(2), never=None) == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_is_never_to_be_chosen_is_not(temperature):
    logits = torch.tensor([[0.0, 9.0, 1.0]]).expand(50, -1)
    tokens = choose(logits, sampling=Sampling(temperature=temperature), draws=draws(50), never=1)
    assert 1 not in tokens
    assert logits[0, 1] == 9.0


def test_a_row_is_drawn_the_same_in_any_company():
    logits = torch.randn(6, 30)
    together = choose(logits, sampling=Sampling(), draws=draws(6), never=None)
    alone = [
        choose(logits[row : row + 1], sampling=Sampling(), draws=draws(6)[row : row + 1], never=None)[0]
        for row in range(6)
    ]
    assert together == alone


def test_logits_off_by_rounding_change_hardly_any_choice():
    logits = torch.randn(2000, 500)
    exact = choose(logits, sampling=Sampling(), draws=draws(2000), never=None)
    off = logits + 1e-6 * torch.randn(2000, 500)
    rounded = choose(off, sampling=Sampling(), draws=draws(2000), never=None)
    assert sum(a != b for a, b in zip(exact, rounded, strict=True)) <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        choose(torch.tensor([[0.0, bad]]), sampling=Sampling(), draws=draws(1), never=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, 10**9)],
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, 1e9)],
        *[("top_k", value) for value in (0, -5)],
        *[("top_p", value) for value in (0.0, -1.0, 1.1, math.nan)],
        *[("seed", value) for value in (-1, 1 << 63)],
        *[("stop", value) for value in ("END", ("",), ("x" * 1001,), ("x",) * 65)],
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} .* must be") as caught:
        Sampling(**{name: value})
    assert "\n" not in str(caught.value)
