"""Eq. 18 as it reads: of each expert the top m tokens, by sorting Python lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.moe.gating.batchwise import (
    batchwise,
    blocks,
    most_pairs,
    num_blocks,
    rank_in_segment,
    tokens_per_expert,
)


def as_it_reads(value_TE, segment_T, num_segments, k):
    """Entry by entry; equal values stand in the order of their tokens."""
    num_tokens, num_experts = value_TE.shape
    chosen_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    for segment in range(num_segments):
        tokens = [t for t in range(num_tokens) if segment_T[t] == segment]
        m = tokens_per_expert(len(tokens), k=k, num_experts=num_experts)
        for expert in range(num_experts):
            best = sorted(tokens, key=lambda t: (-float(value_TE[t, expert]), t))
            chosen_TE[best[:m], expert] = True
    return chosen_TE


@given(st.integers(0, 12), st.integers(1, 6), st.integers(1, 4), st.data())
def test_each_expert_has_the_top_m_tokens_of_each_segment(num_tokens, num_experts, num_segments, data):
    k = data.draw(st.integers(1, num_experts))
    # Few different values: many ties.
    value_TE = torch.randint(0, 4, (num_tokens, num_experts)).double()
    segment_T = torch.randint(0, num_segments + 1, (num_tokens,))
    ours_TE = batchwise(value_TE, segment_T, num_segments=num_segments, k=k)
    assert torch.equal(ours_TE, as_it_reads(value_TE, segment_T, num_segments, k))


@given(st.integers(0, 40), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 12)), st.data())
def test_there_is_room_for_all_pairs_and_without_padding_no_more(num_tokens, num_experts, scope, data):
    k = data.draw(st.integers(1, num_experts))
    mask_T = data.draw(st.sampled_from([None, torch.rand(num_tokens) < 0.6]))
    chosen_TE = batchwise(
        torch.rand(num_tokens, num_experts),
        blocks(num_tokens, scope, mask_T, torch.device("cpu")),
        num_segments=num_blocks(num_tokens, scope),
        k=k,
    )
    room = most_pairs(num_tokens, scope, k=k, num_experts=num_experts)
    assert int(chosen_TE.sum()) <= room
    if mask_T is None:
        assert int(chosen_TE.sum()) == room
    else:
        assert not chosen_TE[~mask_T].any()


@pytest.mark.parametrize(
    ("num_tokens", "m"),
    [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2), (8, 2), (12, 3), (400, 100)],
)
def test_m_is_rounded_to_the_nearest_and_at_least_one_where_there_are_tokens(num_tokens, m):
    assert tokens_per_expert(num_tokens, k=2, num_experts=8) == m


def test_ranks_count_within_a_segment_from_the_largest_value():
    value_TE = torch.tensor([[3.0], [9.0], [5.0], [1.0], [9.0], [7.0]])
    segment_T = torch.tensor([0, 1, 0, 1, 1, 2])
    rank_TE = rank_in_segment(value_TE, segment_T, num_segments=2)
    assert rank_TE[:, 0].tolist() == [1, 0, 0, 2, 1, 0]
