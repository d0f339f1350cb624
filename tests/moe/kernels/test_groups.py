"""Experts in groups: each expert that has rows once, with the rows that are its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.moe.kernels.groups import groups_of, without_rows


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=40),
    most_rows=st.integers(0, 30),
    most_experts=st.integers(0, 9),
)
def test_every_row_is_in_the_group_of_its_expert(counts: list[int], most_rows: int, most_experts: int):
    count_E = torch.tensor(counts)
    end_E = count_E.cumsum(0)
    found = {}
    for group in groups_of(end_E, most_rows=most_rows, most_experts=most_experts):
        assert len(group.experts) == len(group.counts)
        start = group.rows.start
        for expert, count in zip(group.experts, group.counts, strict=True):
            found[expert] = (start, start + count)
            start += count
        assert start == group.rows.stop
        assert len(group.experts) <= max(1, most_experts)
        assert len(group.experts) == 1 or sum(group.counts) <= min(most_rows, sum(counts) // 8)
    ends = end_E.tolist()
    used = [expert for expert, count in enumerate(counts) if count]
    assert found == {expert: (ends[expert] - counts[expert], ends[expert]) for expert in used}
    assert sorted([*used, *without_rows(end_E)]) == list(range(len(counts)))


def test_the_heaviest_are_first_and_light_neighbours_together():
    groups = groups_of(torch.tensor([10, 10, 12, 14, 15, 80]), most_rows=5, most_experts=9)
    assert [group.experts for group in groups] == [[5], [0], [2, 3, 4]]
    assert [group.rows for group in groups] == [slice(15, 80), slice(0, 10), slice(10, 15)]


def test_of_few_rows_there_are_groups_for_every_thread():
    end_E = torch.arange(1, 65)
    assert len(groups_of(end_E, most_rows=1000, most_experts=64)) == 8
    torch.set_num_threads(2)
    assert len(groups_of(end_E, most_rows=1000, most_experts=64)) == 16
