"""Experts spread over ranks are the experts of one process: outputs, losses, every gradient."""

import pytest
import torch

from sparsegate.parallel.placement import experts_of
from tests.helpers.expert_ranks import ALL_GATES, Case, Found, one_process, step_of_a_rank
from tests.helpers.moe_cases import NUM_EXPERTS
from tests.helpers.tolerances import assert_close

SIZES = [(9,), (5, 4), (0, 6, 3), (4, 0, 2, 7)]
CASES = [Case(gate, "feed_forward", sizes) for gate in ALL_GATES for sizes in SIZES[1:]]
CASES += [Case("noisy_topk", experts, sizes) for experts in ("swiglu", "modules") for sizes in SIZES]
CASES += [Case("noisy_topk", "feed_forward", sizes, masked=True) for sizes in SIZES]
CASES += [Case("noisy_topk", "feed_forward", (0, 0, 0, 0)), Case("noisy_topk", "feed_forward", (0, 1, 0))]


def assert_equal_to(expected: Found, found: list[Found]) -> None:
    """The ranks' tokens one after the other, their experts side by side, their gates' gradients added up."""
    assert_close(torch.cat([rank.y_TD for rank in found]), expected.y_TD)
    assert_close(sum(rank.loss for rank in found), expected.loss)
    assert_close(torch.cat([rank.grad_x_TD for rank in found]), expected.grad_x_TD)
    for name, gradient in expected.gate.items():
        assert_close(sum(rank.gate[name] for rank in found), gradient)
    for rank, one in enumerate(found):
        own = experts_of(rank, num_experts=NUM_EXPERTS, num_ranks=len(found))
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
