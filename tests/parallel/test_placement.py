"""Experts are shared out evenly, in order, each to one rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.parallel.placement import experts_of, firsts, split


@given(st.integers(0, 200), st.integers(1, 20))
def test_parts_are_consecutive_and_as_even_as_they_can_be(number, num_parts):
    parts = split(number, num_parts)
    assert [i for part in parts for i in part] == [*range(number)]
    sizes = [len(part) for part in parts]
    assert len(sizes) == num_parts
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 200), st.integers(1, 20))
def test_the_device_knows_the_same_firsts_as_the_host(number, num_parts):
    found = firsts(number, num_parts, device=torch.device("cpu")).tolist()
    assert found == [part.start for part in split(number, num_parts)] + [number]


def test_groups_stay_together_where_ranks_divide_them():
    for rank in range(4):
        assert {expert // 3 for expert in experts_of(rank, num_experts=24, num_ranks=4)} == {
            2 * rank,
            2 * rank + 1,
        }


def test_fewer_experts_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"share the experts \(8\) must not exceed num_experts \(7\)"):
        experts_of(0, num_experts=7, num_ranks=8)
