"""Sums of gradients begin in the backward pass, alike on all ranks, and are those that begin after it."""

import pytest
import torch

from tests.helpers.gradient_ranks import (
    added_by_a_rank,
    are_alike,
    events_of_a_rank,
    refusal_of_a_second_pass,
)
from tests.helpers.spread_models import Case
from tests.helpers.tolerances import assert_close

# Of each rank, the layers that its micro-batches go through.
PASSES = {
    "in other orders": [[[0, 1, 2, 3]], [[3, 2, 1, 0]], [[1, 3, 0, 2]]],
    "not all of them": [[[0, 1, 2]], [[3]], [[]]],
    "in micro-batches": [[[0, 1], [2, 3, 0]], [[3, 3], [0]], [[2], []]],
    "never one": [[[0, 2]], [[2, 3]], [[3]]],
}


@pytest.mark.parametrize("bucket_bytes", [1, 512, 2**20])
def test_sums_that_begin_in_backward_are_those_after_it_bit_for_bit(bucket_bytes, ranks):
    """Buckets of one parameter each, of some, and one of all."""
    assert ranks.run(are_alike, 3, Case("noisy_topk", (2, 0, 3)), bucket_bytes) == [True] * 3


def test_sums_begin_while_tokens_have_yet_to_travel(ranks):
    for events in ranks.run(events_of_a_rank, 3, Case("noisy_topk", (2, 0, 3))):
        before, after = events[: events.index("ended")], events[events.index("ended") + 1 :]
        assert before.count("sum") >= 3
        assert "rows" in before[before.index("sum") :]
        assert after == []


@pytest.mark.parametrize("passes", PASSES.values(), ids=list(PASSES))
def test_ranks_may_use_parameters_otherwise(passes, ranks):
    found = ranks.run(added_by_a_rank, 3, passes)
    for place, totals in enumerate(zip(*(rank.total for rank in found), strict=True)):
        own = [rank.own[place] for rank in found if rank.own[place] is not None]
        assert all(torch.equal(total, totals[0]) for total in totals)
        assert_close(totals[0], sum(own) if own else torch.zeros_like(totals[0]))


def test_what_is_frozen_has_no_sum(ranks):
    for rank in ranks.run(added_by_a_rank, 2, [[[0, 1, 2, 3]], [[3, 2, 1, 0]]], 1):
        assert [gradient is None for gradient in rank.total] == [False] * 2 + [True] * 2 + [False] * 4


def test_a_second_pass_in_the_block_is_refused(ranks):
    (said,) = ranks.run(refusal_of_a_second_pass, 1)
    assert "came after its sum over the ranks had begun" in said
