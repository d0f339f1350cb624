"""Ranks that wait in vain say for whom, at which step and where, and soon."""

import pytest

from sparsegate.training.missing import naming_the_missing
from tests.helpers.waiting_ranks import LATEST_S, wait_in_layouts_on_rank, wait_on_rank


@pytest.mark.parametrize(
    ("where", "place"), [("sum", "ranks.sum"), ("backward", "exchange.end"), ("gradients", "gradients.end")]
)
def test_who_does_not_come_is_named_by_all_others(where, place, ranks):
    (late, _), *others = ranks.run(wait_on_rank, 4, 0, where)
    for said, seconds in others:
        assert said.startswith(f"the ranks waited in vain for rank 0, after step 7, in {place} (")
        assert seconds < LATEST_S
    assert "for each other, as one came too late, after step 7" in late


@pytest.mark.parametrize(("where", "named"), [("backward", "1"), ("sum", "1, 2")])
def test_a_rank_of_another_copy_is_not_missed_among_those_that_tokens_travel_among(where, named, ranks):
    """It may be computing still: two come late, one of them a neighbour of the first rank."""
    said, _ = ranks.run(wait_for_two_on_rank, 4, where)[0]
    assert said.startswith(f"the ranks waited in vain for rank {named}, after step 7")


def wait_for_two_on_rank(mesh, where):
    rank = mesh.get_local_rank()
    return wait_on_rank(mesh, rank if rank in (1, 2) else -1, where, near=(0, 1))


def test_ranks_of_a_copy_and_of_a_node_wait_as_long_as_they_are_told(ranks):
    first, second, *others = ranks.run(wait_in_layouts_on_rank, 4)
    assert first == []
    assert len(second) == 2
    assert max(second) < LATEST_S
    assert [len(waited) for waited in others] == [0, 2]


def test_what_is_no_wait_for_ranks_stays_what_it_is(ranks):
    with pytest.raises(RuntimeError, match="of another kind"), naming_the_missing(None, lambda: 7):
        raise RuntimeError("of another kind")
    assert ranks.run(fail_on_rank, 2) == ["of another kind"] * 2


def fail_on_rank(mesh):
    try:
        with naming_the_missing(mesh.get_group(), lambda: 7):
            raise RuntimeError("of another kind")
    except RuntimeError as error:
        return str(error)
