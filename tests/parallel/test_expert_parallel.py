"""Experts spread over ranks are the experts of one process: outputs, losses, every gradient."""

from dataclasses import replace

import pytest
import torch

from sparsegate.parallel.placement import experts_of
from tests.helpers.expert_ranks import (
    ALL_GATES,
    Case,
    Found,
    bytes_between_nodes,
    events_of_a_rank,
    host_waits_of_a_rank,
    one_process,
    random_case,
    rows_sent_by_a_rank,
    step_of_a_rank,
    step_with_wrong_counts,
)
from tests.helpers.moe_cases import WIDTH
from tests.helpers.tolerances import assert_close

SIZES = [(9,), (5, 4), (0, 6, 3), (4, 0, 2, 7)]
CASES = [Case(gate, "feed_forward", sizes) for gate in ALL_GATES for sizes in SIZES[2:]]
CASES += [Case("noisy_topk", experts, sizes) for experts in ("feed_forward", "modules") for sizes in SIZES]
CASES += [Case("noisy_topk", "swiglu", (5, 4))]
CASES += [Case("noisy_topk", "feed_forward", sizes, masked=True) for sizes in SIZES]
CASES += [Case("noisy_topk", "feed_forward", (0, 0, 0, 0)), Case("noisy_topk", "feed_forward", (0, 1, 0))]
OVER_NODES = [Case(gate, "feed_forward", (4, 0, 2, 7)) for gate in ("noisy_topk", "hierarchical", "balanced")]
OVER_NODES += [Case("noisy_topk", "modules", sizes) for sizes in ((4, 0, 2, 7), (0, 0, 3, 0), (0, 0, 0, 0))]
OVER_NODES += [Case("noisy_topk", "feed_forward", (4, 0, 2, 7), num_experts=n) for n in (4, 5, 7, 11)]
OVER_NODES += [Case("noisy_topk", "feed_forward", (4, 0, 2, 7), masked=True)]


def assert_equal_to(expected: Found, found: list[Found]) -> None:
    """The ranks' tokens one after the other, their experts side by side, their gates' gradients added up."""
    assert_close(torch.cat([rank.y_TD for rank in found]), expected.y_TD)
    assert_close(sum(rank.loss for rank in found), expected.loss)
    assert_close(torch.cat([rank.grad_x_TD for rank in found]), expected.grad_x_TD)
    for name, gradient in expected.gate.items():
        assert_close(sum(rank.gate[name] for rank in found), gradient)
    num_experts = len(expected.sums.count_E)
    for rank, one in enumerate(found):
        own = experts_of(rank, num_experts=num_experts, num_ranks=len(found))
        for name, gradient in one.experts.items():
            assert_close(gradient, of_one_process(expected.experts, name, own))
        for name, value in vars(one.sums).items():
            assert_close(value.double(), vars(expected.sums)[name].double())


def of_one_process(experts: dict[str, torch.Tensor], name: str, own: range) -> torch.Tensor:
    """A stacked gradient is cut; that of a module stands under its own number."""
    if name in ("w_in", "w_out"):
        return experts[name][own.start : own.stop]
    _, number, rest = name.split(".", 2)
    return experts[f"experts.{own.start + int(number)}.{rest}"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_compute_what_one_process_does(case, ranks):
    assert_equal_to(one_process(case, joined=False), ranks.run(step_of_a_rank, case.num_ranks, case))


@pytest.mark.parametrize("gate", ["noisy_topk", "topk", "hierarchical"])
def test_gates_that_choose_token_by_token_have_the_losses_of_the_joined_batch(gate, ranks):
    case = Case(gate, "feed_forward", (4, 0, 2, 7))
    assert_equal_to(one_process(case, joined=True), ranks.run(step_of_a_rank, case.num_ranks, case))


def test_a_token_goes_once_to_each_rank_that_has_an_expert_of_it(ranks):
    """Counted at the collectives: rows there and back, twice each in forward and backward."""
    case = Case("softmax", "feed_forward", (3, 5))  # every token needs every expert
    for rank, rows in enumerate(ranks.run(rows_sent_by_a_rank, 2, case)):
        assert rows == 2 * [2 * case.sizes[rank], sum(case.sizes)]


@pytest.mark.parametrize("case", OVER_NODES, ids=str)
def test_tokens_that_go_by_way_of_nodes_find_the_same(case, ranks):
    found = ranks.run(step_of_a_rank, 4, replace(case, per_node=2))
    assert_equal_to(one_process(case, joined=False), found)


def test_nodes_of_any_size_are_the_same_to_the_experts(ranks):
    case = Case("noisy_topk", "feed_forward", (4, 0, 2, 7))
    for per_node in (1, 4):
        found = ranks.run(step_of_a_rank, 4, replace(case, per_node=per_node))
        assert_equal_to(one_process(case, joined=False), found)


PIECES = [Case(gate, "feed_forward", (9, 4), num_pieces=2) for gate in ALL_GATES]
PIECES += [Case("noisy_topk", experts, (4, 0, 7), num_pieces=3) for experts in ("swiglu", "modules")]
PIECES += [
    Case("noisy_topk", "feed_forward", sizes, num_pieces=4) for sizes in ((1, 3), (0, 9), (0, 0), (7,))
]
PIECES += [Case("noisy_topk", "feed_forward", (4, 0, 2, 7), num_pieces=2, per_node=2, masked=True)]


@pytest.mark.parametrize("case", PIECES, ids=str)
def test_tokens_that_travel_in_pieces_find_the_same(case, ranks):
    assert_equal_to(one_process(case, joined=False), ranks.run(step_of_a_rank, case.num_ranks, case))


def test_a_piece_travels_while_another_is_computed_forward_and_backward(ranks):
    case = Case("noisy_topk", "feed_forward", (5, 4), num_pieces=2)
    pipeline = ["send", "send", "wait", "compute", "send", "wait", "compute", "send", "wait", "wait"]
    assert ranks.run(events_of_a_rank, 2, case) == [(pipeline, pipeline)] * 2
    at_once = ["send", "wait", "compute", "send", "wait"]
    assert ranks.run(events_of_a_rank, 2, replace(case, num_pieces=1)) == [(at_once, at_once)] * 2


def test_a_token_crosses_once_to_each_node_that_has_an_expert_of_it(ranks):
    """Of four ranks on two nodes, when every token needs every expert: half the rows between nodes."""
    case = Case("softmax", "feed_forward", (300, 0, 200, 100))
    direct, by_node = (
        sum(ranks.run(bytes_between_nodes, 4, replace(case, per_node=per_node), 2)) for per_node in (None, 2)
    )
    rows, pairs = 600 * 4 * WIDTH * 8, 600 * 3 * (2 * 8 + 4)  # there and back, twice; three experts a node
    assert direct == 2 * rows + pairs + 4 * 2 * 3 * 8
    assert by_node == rows + pairs + 4 * 7 * 8


@pytest.mark.parametrize(("sizes", "per_node"), [((3, 5), None), ((3, 5, 0, 4), 2)], ids=str)
@pytest.mark.parametrize("num_pieces", [1, 2])
def test_one_forward_pass_waits_once_for_the_host(sizes, per_node, num_pieces, ranks):
    """Numbers leave the device once: for the counts."""
    case = Case("noisy_topk", "feed_forward", sizes, per_node=per_node, num_pieces=num_pieces)
    assert ranks.run(host_waits_of_a_rank, len(sizes), case) == [1] * len(sizes)


@pytest.mark.parametrize("by", [1, -1, -1000, 1 << 40])
@pytest.mark.parametrize("where", ["counting", "on the way"])
@pytest.mark.parametrize(("sizes", "per_node"), [((3, 5, 4), None), ((3, 5, 4, 0), 2)], ids=str)
def test_wrong_counts_of_one_rank_are_the_same_error_everywhere_before_a_row_moves(
    sizes, per_node, where, by, ranks
):
    case = Case("noisy_topk", "feed_forward", sizes, per_node=per_node)
    found = ranks.run(step_with_wrong_counts, len(sizes), case, 1, where, by)
    assert {moved for _, moved in found} == {0}
    assert len({message for message, _ in found}) == 1
    assert "from rank 1 do not fit" in found[0][0]


@pytest.mark.parametrize("kind", ["of the layer", "of the experts"])
def test_recomputed_passes_have_the_same_gradients(kind, ranks):
    case = Case("noisy_topk", "feed_forward", (3, 0, 5), recompute=kind)
    assert_equal_to(one_process(case, joined=True), ranks.run(step_of_a_rank, case.num_ranks, case))


@pytest.mark.parametrize(("first", "last"), [(0, 30), pytest.param(30, 200, marks=pytest.mark.nightly)])
def test_any_distribution_of_tokens_over_ranks_and_experts(first, last, ranks):
    """Random numbers of tokens, many of them zero; gates that favour few experts; uneven shares of these."""
    for seed in range(first, last):
        case = random_case(seed)
        assert_equal_to(one_process(case, joined=True), ranks.run(step_of_a_rank, case.num_ranks, case))


@pytest.mark.parametrize(("first", "last"), [(0, 20), pytest.param(20, 200, marks=pytest.mark.nightly)])
def test_any_distribution_of_tokens_over_nodes(first, last, ranks):
    for seed in range(first, last):
        case = random_case(seed, fewest_ranks=4)
        found = ranks.run(step_of_a_rank, 4, replace(case, per_node=2))
        assert_equal_to(one_process(case, joined=True), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_numbers_travel_as_well(dtype, ranks):
    case = Case("topk", "feed_forward", (6, 3), dtype=dtype)
    expected = one_process(case, joined=True)
    for rank, found in enumerate(ranks.run(step_of_a_rank, 2, case)):
        own = slice(0, 6) if rank == 0 else slice(6, 9)
        assert found.y_TD.dtype == dtype
        assert_close(found.y_TD, expected.y_TD[own])
        assert_close(found.grad_x_TD, expected.grad_x_TD[own])
