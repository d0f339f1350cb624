"""Routing and BalanceSums as values: trees of tensors that come back whole."""

import pytest
import torch
from torch.utils import _pytree as pytree

from sparsegate.moe.routing import BalanceSums, Routing
from tests.helpers.moe_cases import a_batch, a_moe, a_routing

LEAVES = [
    "token_N",
    "expert_N",
    "weight_N",
    "pairs_T",
    "importance_E",
    "count_E",
    "within_load_E",
    "group_load_A",
    "group_count_A",
    "within_probability_E",
    "group_probability_A",
    "z",
    "threshold",
    "num_tokens",
    "num_unrouted",
    "num_dropped",
]


def some_routing() -> Routing:
    batch = a_batch(5)
    return a_moe()(batch.x_TD, None, batch.noise_TE)[1]


def test_a_routing_is_a_tree_of_its_tensors():
    routing = some_routing()
    leaves, spec = pytree.tree_flatten(routing)
    assert len(leaves) == len(LEAVES)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    back = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, Routing)
    assert isinstance(back.sums, BalanceSums)
    assert back.num_experts == routing.num_experts
    assert back.pairs_per_token == routing.pairs_per_token
    for ours, theirs in zip(pytree.tree_leaves(back), leaves, strict=True):
        assert ours is theirs


def test_its_leaves_are_named_and_its_shape_can_be_stored():
    routing = some_routing()
    with_paths, spec = pytree.tree_flatten_with_path(routing)
    assert [path[-1].name for path, _ in with_paths] == LEAVES
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_routing_and_sums_are_values_that_cannot_be_changed():
    routing = some_routing()
    for value in (routing, routing.sums):
        with pytest.raises(AttributeError, match="cannot assign"):
            value.num_tokens = 3


def test_a_token_that_is_not_real_is_no_pair_and_no_count():
    mask_T = torch.tensor([True, False, True])
    routing = a_routing(torch.tensor([[0, 1], [2, 3], [1, 4]]), torch.ones(3, 2), mask_T=mask_T)
    assert routing.expert_N.tolist() == [0, 1, 6, 6, 1, 4]
    assert routing.weight_N.tolist() == [1, 1, 0, 0, 1, 1]
    assert routing.sums.count_E.tolist() == routing.sums.load_E.tolist() == [1, 2, 0, 0, 1, 0]
    assert routing.sums.num_tokens == 2


def test_the_shapes_follow_from_the_shape_of_the_input_and_not_from_its_values():
    moe, batch = a_moe(), a_batch(6)
    for mask in (None, torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)):
        _, routing = moe(batch.x_TD, mask)
        assert routing.expert_N.shape == routing.weight_N.shape == routing.token_N.shape == (12,)
