"""A finished model over ranks trains as it does in one process: losses, norms, weights after ten updates."""

import pytest
import torch

from sparsegate.parallel.placement import experts_of
from tests.helpers.spread_models import (
    Case,
    Trained,
    held_of_a_rank,
    refusals_of_a_rank,
    shared_experts_of_a_rank,
    train_in_one_process,
    train_on_rank,
)
from tests.helpers.tolerances import assert_close

CASES = [
    *(Case("noisy_topk", rows) for rows in [(4,), (3, 1), (2, 0, 3), (1, 2, 0, 2)]),
    *(Case(gate, (1, 2, 0, 2)) for gate in ("hierarchical", "balanced", "expert_choice")),
    *(Case(gate, (3, 0, 2), selection="gathered") for gate in ("balanced", "expert_choice")),
    Case("noisy_topk", (2, 0, 3), num_experts=7),
    Case("noisy_topk", (2, 3), fsdp=True),
    Case("hierarchical", (1, 2, 0, 2), fsdp=True),
    *(Case("noisy_topk", rows, words=True) for rows in [(4,), (3, 1), (2, 0, 3)]),
    *(Case("noisy_topk", rows, words=True, samples=5) for rows in [(4,), (3, 1), (2, 0, 3)]),
    Case("noisy_topk", (2, 3), words=True, fsdp=True),
    Case("noisy_topk", (1, 2, 0, 2), copies=2),
    Case("noisy_topk", (1, 2, 0, 2), copies=2, fsdp=True),
    Case("noisy_topk", (1, 2, 0, 2), per_node=2, num_experts=7),
    Case("balanced", (1, 2, 0, 2), per_node=2, selection="gathered"),
    Case("noisy_topk", (1, 2, 0, 2), copies=2, per_node=1),
    *(Case("noisy_topk", (1, 2, 0, 2), copies=copies, cut=True) for copies in (2, 4)),
    *(Case("noisy_topk", (1, 2, 0, 2), copies=2, cut=True, fsdp=True, num_experts=n) for n in (2, 3, 7)),
    Case("hierarchical", (2, 0, 3, 1), copies=2, cut=True, pieces=2, num_experts=9),
    Case("balanced", (1, 2, 0, 2), copies=2, cut=True, per_node=1),
    Case("expert_choice", (1, 2, 0, 2), copies=2, selection="gathered"),
]


def assert_trained_alike(case: Case, expected: Trained, found: list[Trained]) -> None:
    for update in range(case.num_updates):
        assert sum(rank.losses[update] for rank in found) == pytest.approx(expected.losses[update], rel=1e-9)
        for rank in found:
            assert rank.norms[update] == pytest.approx(expected.norms[update], rel=1e-9)
    expert_ranks = len(found) // case.copies
    for number, rank in enumerate(found):
        own = experts_of(number % expert_ranks, num_experts=case.num_experts, num_ranks=expert_ranks)
        assert rank.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            if ".experts." in name:
                weight = weight[own.start : own.stop]
            if case.words and name.startswith(("embedding.", "softmax.")):
                weight = weight[number::expert_ranks]
            assert_close(rank.weights[name], weight)
            assert torch.equal(rank.weights[name], found[number % expert_ranks].weights[name]), "copies drift"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ten_updates_on_ranks_are_those_of_one_process(case, ranks):
    joined = case.selection == "gathered" or case.gate in ("noisy_topk", "hierarchical")
    found = ranks.run(train_on_rank, len(case.rows), case)
    assert_trained_alike(case, train_in_one_process(case, joined=joined), found)


def test_experts_that_are_cut_are_nowhere_twice(ranks):
    """One expert for two ranks is cut along its weights."""
    held = ranks.run(held_of_a_rank, 4)
    assert {4 * own for own, _ in held} == {whole for _, whole in held}


def test_layers_that_share_their_experts_go_on_sharing_them(ranks):
    assert ranks.run(shared_experts_of_a_rank, 2) == [(4, True)] * 2


def test_what_cannot_be_spread_is_refused(ranks):
    no_mixture, no_name, uneven, no_copies = ranks.run(refusals_of_a_rank, 1)[0]
    assert no_mixture == "model (Linear) has no MoE layer whose experts could be spread"
    assert no_name.startswith("mesh (dimensions tensor) must have the dimension 'expert'")
    assert uneven.startswith("ranks_per_node (3) must divide the number of ranks that share the experts (1)")
    assert no_copies.startswith("mesh (dimension 'expert' alone) must have the dimension 'data'")
