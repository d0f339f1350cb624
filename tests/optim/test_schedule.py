"""The learning rate over the steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.optim.schedule import warmup_then_inverse_sqrt

STEPS, WARMUPS = st.integers(1, 10**7), st.integers(1, 10**5)


@given(step=STEPS, warmup=WARMUPS, peak=st.floats(1e-6, 10))
def test_it_is_the_formula_of_the_paper(step: int, warmup: int, peak: float):
    """Linear for the first steps, then proportional to 1/sqrt(step), without a jump."""
    rate = warmup_then_inverse_sqrt(step=step, peak=peak, warmup_steps=warmup)
    expected = peak * step / warmup if step <= warmup else peak * warmup**0.5 / step**0.5
    assert rate == pytest.approx(expected, rel=1e-12)


@given(warmup=WARMUPS)
def test_the_peak_is_reached_at_the_end_of_the_warm_up_and_nowhere_else(warmup: int):
    def rate(step: int) -> float:
        return warmup_then_inverse_sqrt(step=step, peak=1.0, warmup_steps=warmup)

    assert rate(warmup) == 1.0
    assert rate(warmup + 1) < 1.0
    assert warmup == 1 or rate(warmup - 1) < 1.0


def test_without_a_warm_up_the_first_step_has_the_peak():
    rates = [warmup_then_inverse_sqrt(step=step, peak=2.0, warmup_steps=0) for step in (1, 4, 100)]
    assert rates == [2.0, 1.0, 0.2]


@given(step=STEPS, warmup=WARMUPS, constant=st.integers(0, 10**5))
def test_after_the_warm_up_it_stays_and_then_falls_without_a_jump(step: int, warmup: int, constant: int):
    rate = warmup_then_inverse_sqrt(step=step, peak=2.0, warmup_steps=warmup, constant_steps=constant)
    if step <= warmup:
        assert rate == pytest.approx(2.0 * step / warmup, rel=1e-12)
    elif step <= warmup + constant:
        assert rate == 2.0
    else:
        assert rate == pytest.approx(2.0 * ((warmup + constant) / step) ** 0.5, rel=1e-12)
