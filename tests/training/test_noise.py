"""Every draw of training is a pure function of the seed and the batch's index."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegate.training.noise import Draw, derived_seed, gate_noise

WIDTHS = {"first": 5, "second": 3}


def noise(
    *, seed: int = 1, batch_index: int = 7, first_row: int = 0, rows: int = 6, steps: int = 4
) -> dict[str, torch.Tensor]:
    return gate_noise(WIDTHS, seed=seed, batch_index=batch_index, first_row=first_row, shape_BS=(rows, steps))


@given(cuts=st.lists(st.integers(1, 5), max_size=3, unique=True))
def test_a_token_gets_the_same_draw_however_the_rows_are_split(cuts: list[int]):
    whole = noise()
    borders = [0, *sorted(cuts), 6]
    parts = [noise(first_row=a, rows=b - a) for a, b in pairwise(borders)]
    for name, draws in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), draws)


def test_draws_are_what_the_gates_expect():
    drawn = noise()
    assert {name: (list(d.shape), d.dtype) for name, d in drawn.items()} == {
        "first": ([6, 4, 5], torch.float32),
        "second": ([6, 4, 3], torch.float32),
    }
    assert gate_noise({}, seed=1, batch_index=0, first_row=0, shape_BS=(2, 3)) == {}


def test_they_are_standard_normal_and_independent_of_each_other():
    """Bounds are five standard deviations of the estimates."""
    draws = noise(rows=400, steps=50)["first"].double()
    n = draws.numel()
    assert abs(draws.mean()) < 5 / n**0.5
    assert abs(draws.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((draws**4).mean() - 3) < 5 * (96 / n) ** 0.5
    neighbours = [
        (draws[:-1], draws[1:]),
        (draws[:, :-1], draws[:, 1:]),
        (noise(rows=400, steps=50, batch_index=8)["first"].double(), draws),
        (noise(rows=400, steps=50, seed=2)["first"].double(), draws),
    ]
    for one, other in neighbours:
        assert abs((one * other).mean()) < 5 / one.numel() ** 0.5


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = noise()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(noise()["first"], first["first"])


@settings(max_examples=50)
@given(draw=st.sampled_from(Draw), keys=st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_seeds_are_ones_that_torch_takes_and_repeat(draw: Draw, keys: list[int]):
    seed = derived_seed(draw, *keys)
    assert 0 <= seed < 2**63
    assert derived_seed(draw, *keys) == seed
    torch.Generator().manual_seed(seed)


def test_near_keys_give_unlike_seeds_and_no_draw_shares_a_stream_with_another():
    keys = [(Draw.WEIGHTS, seed) for seed in range(30)]
    keys += [
        (draw, seed, batch, row)
        for draw in (Draw.GATE_NOISE, Draw.DROPOUT)
        for seed in range(10)
        for batch in range(10)
        for row in range(5)
    ]
    assert len({derived_seed(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("draw", "keys", "seed"),
    [(Draw.WEIGHTS, (1,), 38901565946305238), (Draw.GATE_NOISE, (1, 7, 0), 2590609274448731813)],
)
def test_seeds_do_not_change_from_one_release_to_the_next(draw: Draw, keys: tuple[int, ...], seed: int):
    assert derived_seed(draw, *keys) == seed
