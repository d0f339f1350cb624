"""Rounding at random: on the grid, unbiased, and a function of seed, parameter, step, matrix and place."""

import pytest
import torch

from sparsegate.optim.rounding import RoundingNoise, round_at_random_

CPU = torch.device("cpu")
SHAPE = torch.Size((1, 64, 1024))


def noise(**changes) -> torch.Tensor:
    keys = {"seed": 1, "parameter": 0, "step": 3, "first_matrix": 2, **changes}
    return RoundingNoise(keys.pop("seed")).draw(SHAPE, device=CPU, **keys)


@pytest.mark.parametrize(
    "value", [1.0039, -1.0039, 3.7e-3, 0.999, 1e-38, 5e-40, -0.0, 0.0, 3.3e38], ids="{:g}".format
)
def test_a_number_becomes_one_of_its_neighbours_and_on_average_itself(value):
    value_N = torch.full((SHAPE.numel(),), value)
    exact = value_N.double()[0]
    rounded_N = round_at_random_(value_N, noise().flatten())
    assert torch.equal(rounded_N, rounded_N.bfloat16().float())
    low, high = rounded_N.double().aminmax()
    assert low <= exact <= high
    bits = rounded_N.unique().view(torch.int32)
    assert len(bits) == 1 or (bits.diff().abs() == 1 << 16).all()
    # 65,536 draws: five standard deviations of their mean are a hundredth of the spacing.
    assert abs(rounded_N.double().mean() - exact) <= (high - low) / 100


def test_a_number_that_bfloat16_has_stays():
    value_N = torch.randn(SHAPE.numel()).bfloat16().float()
    assert torch.equal(round_at_random_(value_N.clone(), noise().flatten()), value_N)


def test_equal_keys_give_equal_draws_and_any_other_key_gives_others():
    assert torch.equal(noise(), noise())
    for changes in ({"seed": 2}, {"parameter": 1}, {"step": 4}, {"first_matrix": 3}):
        share = (noise() == noise(**changes)).float().mean()
        assert share < 1e-3


def test_draws_are_even_over_their_range():
    found = noise().flatten()
    assert found.min() >= 0
    assert found.max() < 1 << 16
    counts = torch.bincount(found >> 12, minlength=16)
    assert (counts - SHAPE.numel() / 16).abs().max() < 400  # six standard deviations


def test_matrices_drawn_together_have_the_draws_that_each_has_alone():
    source = RoundingNoise(1)
    together = source.draw(torch.Size((3, 4, 5)), parameter=0, step=1, first_matrix=6, device=CPU)
    for index in range(3):
        alone = source.draw(torch.Size((1, 4, 5)), parameter=0, step=1, first_matrix=6 + index, device=CPU)
        assert torch.equal(together[index], alone[0])
