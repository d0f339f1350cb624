"""Gates that choose over the batch choose, gathered, what one process chooses of the joined batch."""

import pytest

from tests.helpers.expert_ranks import Case, one_process, routing_of_a_rank, step_of_a_rank
from tests.parallel.test_expert_parallel import assert_equal_to

OVER_BATCH = ["expert_choice", "balanced", "last_dropped", "lightest_dropped", "hierarchical_balanced"]


@pytest.mark.parametrize("sizes", [(5, 4), (4, 0, 2, 7)], ids=str)
@pytest.mark.parametrize("gate", OVER_BATCH)
def test_gathered_gates_have_the_joined_batch_before_them(gate, sizes, ranks):
    case = Case(gate, "feed_forward", sizes, gathered=True)
    assert_equal_to(one_process(case, joined=True), ranks.run(step_of_a_rank, case.num_ranks, case))


def test_padding_is_padding_when_gathered(ranks):
    case = Case("balanced", "feed_forward", (5, 0, 8), masked=True, gathered=True)
    assert_equal_to(one_process(case, joined=True), ranks.run(step_of_a_rank, case.num_ranks, case))


@pytest.mark.parametrize("gate", OVER_BATCH)
def test_in_evaluation_each_rank_decides_for_itself(gate, ranks):
    """All may be measuring the same text: gathered, each token would compete with copies of itself."""
    case = Case(gate, "feed_forward", (5, 4), training=False, gathered=True)
    assert_equal_to(one_process(case, joined=False), ranks.run(step_of_a_rank, case.num_ranks, case))


@pytest.mark.parametrize("gate", ["balanced_over_noisy", "last_dropped"])
def test_draws_that_a_gate_makes_by_itself_are_the_same_on_all_ranks(gate, ranks):
    """So that together the ranks keep each pair once: as many as one process would."""
    case = Case(gate, "feed_forward", (5, 4, 6), gathered=True)
    found = ranks.run(routing_of_a_rank, case.num_ranks, case)
    assert sum(num_pairs for num_pairs, _ in found) == sum(in_sums for _, in_sums in found)
