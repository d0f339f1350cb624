"""Capacity against a loop that fills experts one pair at a time."""

import math

import pytest
import torch

from sparsegate import Capacity, NoisyTopK, SigmoidTopK, Softmax, SoftmaxTopK
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, dense
from tests.helpers.tolerances import assert_close

NUM_TOKENS = 20


def a_topk() -> SoftmaxTopK:
    gate = SoftmaxTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=2, dtype=torch.float64)
    torch.nn.init.normal_(gate.w_gate)
    return gate


def filled(weight_TE, *, factor, drop, scope, mask_T):
    """G(x) after dropping: pairs are served one by one, in the order of the policy."""
    kept_TE = torch.zeros_like(weight_TE)
    for start in range(0, len(weight_TE), scope):
        tokens = [t for t in range(start, min(start + scope, len(weight_TE))) if mask_T[t]]
        room = math.ceil(round(factor * 2 * len(tokens) / NUM_EXPERTS, 9))
        pairs = [(t, e) for t in tokens for e in range(NUM_EXPERTS) if weight_TE[t, e] > 0]
        if drop == "lightest":
            pairs.sort(key=lambda pair: (-weight_TE[pair].item(), pair[0]))
        taken = [0] * NUM_EXPERTS
        for t, e in pairs:
            if taken[e] < room:
                taken[e] += 1
                kept_TE[t, e] = weight_TE[t, e]
    return kept_TE


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", [None, 7])
@pytest.mark.parametrize("drop", ["last", "lightest"])
@pytest.mark.parametrize("factor", [1.0, 1.1, 1.5, 100.0])
def test_an_expert_serves_as_many_pairs_as_it_has_room_for(factor, drop, scope, padded, training):
    inner = a_topk()
    gate = Capacity(inner, factor=factor, drop=drop, scope=scope).train(training)
    mask_T = torch.rand(NUM_TOKENS) < 0.7 if padded else torch.ones(NUM_TOKENS, dtype=torch.bool)
    x_TD = torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64)
    asked, routing = inner(x_TD, mask_T), gate(x_TD, mask_T)
    expected_TE = filled(dense(asked), factor=factor, drop=drop, scope=scope or NUM_TOKENS, mask_T=mask_T)
    assert_close(dense(routing), expected_TE)
    dropped = int((dense(asked) > 0).sum() - (expected_TE > 0).sum())
    assert dropped > 0 if factor < 1.2 else factor < 100 or dropped == 0
    assert routing.sums.num_dropped == dropped
    assert routing.sums.num_unrouted == (expected_TE.sum(dim=1)[mask_T] == 0).sum()
    assert torch.equal(routing.sums.count_E, asked.sums.count_E)
    assert torch.equal(routing.sums.importance_E, asked.sums.importance_E)


def test_a_factor_with_room_for_all_changes_nothing():
    inner = NoisyTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=2)
    gate = Capacity(inner, factor=NUM_EXPERTS / 2)
    x_TD, noise_TE = torch.randn(NUM_TOKENS, WIDTH), torch.randn(NUM_TOKENS, NUM_EXPERTS)
    ours, theirs = gate(x_TD, None, noise_TE), inner(x_TD, None, noise_TE)
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert torch.equal(ours.weight_N, theirs.weight_N)
    assert ours.sums.num_dropped == 0


def test_a_factor_that_is_no_binary_fraction_leaves_the_room_that_it_says():
    gate = Capacity(Softmax(width=WIDTH, num_experts=1), factor=1.1)
    # 10 * 1.1 is 11.000000000000002: room for 11, and not for 12.
    assert gate._room(torch.zeros(10, dtype=torch.int64), 1)[0] == 11


def test_drops_of_a_capacity_within_another_are_counted_as_well():
    inner = Capacity(a_topk(), factor=1.5)
    gate = Capacity(inner, factor=1.0)
    routing = gate(torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64))
    used = int((routing.expert_N < NUM_EXPERTS).sum())
    assert used + int(routing.sums.num_dropped) == int(routing.sums.count_E.sum()) == 2 * NUM_TOKENS


def test_the_last_tokens_give_way_and_earlier_ones_never_see_them():
    gate = Capacity(a_topk(), factor=1.0)
    x_TD = torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64)
    before_TE = dense(gate(x_TD))
    x_TD[12:] = torch.randn(8, WIDTH, dtype=torch.float64)
    assert torch.equal(dense(gate(x_TD))[:12], before_TE[:12])
    assert not gate.sees_later_tokens
    assert Capacity(a_topk(), factor=1.0, drop="lightest").sees_later_tokens


def test_a_step_reaches_the_gate_inside():
    inner = SigmoidTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=2)
    gate = Capacity(inner, factor=1.25)
    gate.after_step(gate(torch.randn(NUM_TOKENS, WIDTH)).sums)
    assert inner.bias.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"factor": 0.9},
            r"factor \(0.9\) must be at least 1 and finite; below 1, perfect balance drops tokens",
        ),
        ({"factor": 0}, r"factor \(0\) must be at least 1"),
        ({"factor": float("nan")}, r"factor \(nan\) must be at least 1"),
        ({"factor": float("inf")}, r"factor \(inf\) must be at least 1"),
        ({"drop": "first"}, r"drop \(first\) must be last or lightest"),
        ({"scope": -1}, r"scope \(-1\) must be at least 1 token"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Capacity(a_topk(), **{"factor": 1.0, **wrong})
