"""Top-k gating without noise: which experts, which weights, what the jitter does."""

import math

import pytest
import torch

from sparsegate import MoE, SoftmaxTopK
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from tests.helpers import moe_oracle as oracle
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, gradients
from tests.helpers.tolerances import assert_close


def a_topk(**options) -> SoftmaxTopK:
    gate = SoftmaxTopK(width=WIDTH, num_experts=NUM_EXPERTS, dtype=torch.float64, **options)
    torch.nn.init.normal_(gate.w_gate)
    return gate


def dense(routing) -> torch.Tensor:
    """G(x), [T, E]."""
    weight_TE = torch.zeros(int(routing.sums.num_tokens), NUM_EXPERTS, dtype=torch.float64)
    return weight_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N)


@pytest.mark.parametrize("k", range(1, NUM_EXPERTS + 1))
def test_renormalized_weights_are_eq_3_without_noise(k):
    gate, x_TD = a_topk(k=k), torch.randn(9, WIDTH, dtype=torch.float64)
    assert_close(dense(gate(x_TD)), oracle.gates(x_TD @ gate.w_gate, k))


@pytest.mark.parametrize("k", range(1, NUM_EXPERTS + 1))
def test_other_weights_are_the_k_largest_probabilities_of_all_experts(k):
    gate, x_TD = a_topk(k=k, renormalize=False), torch.randn(9, WIDTH, dtype=torch.float64)
    probability_TE = torch.exp(x_TD @ gate.w_gate)
    probability_TE = probability_TE / probability_TE.sum(dim=1, keepdim=True)
    for weight_E, probability_E in zip(dense(gate(x_TD)), probability_TE, strict=True):
        kept = oracle.keep_topk(probability_E, k)
        is_kept_E = torch.tensor([expert in kept for expert in range(NUM_EXPERTS)])
        assert_close(weight_E, probability_E * is_kept_E)


def test_it_is_noisy_top_k_gating_in_evaluation():
    gate, x_TD = a_topk(k=2), torch.randn(9, WIDTH, dtype=torch.float64)
    noisy = NoisyTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=2, dtype=torch.float64).eval()
    noisy.w_gate.data.copy_(gate.w_gate)
    ours, theirs = gate(x_TD), noisy(x_TD)
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert torch.equal(ours.weight_N, theirs.weight_N)


def test_with_one_expert_the_task_trains_the_gate_only_where_weights_are_not_renormalized():
    for renormalize in (True, False):
        torch.manual_seed(0)
        gate = a_topk(k=1, renormalize=renormalize)
        moe = MoE(gate=gate, experts=FeedForward(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS).double())
        y_TD, _ = moe(torch.randn(9, WIDTH, dtype=torch.float64))
        (gradient,) = gradients(y_TD.square().sum(), gate.w_gate)
        assert bool(gradient.abs().max() > 1e-3) != renormalize


@pytest.mark.parametrize("draw", [-40.0, -1.0, 0.0, 1.0, 40.0])
def test_jitter_is_uniform_and_meets_the_gate_alone(draw):
    gate, plain = a_topk(k=1, jitter=0.25), a_topk(k=1)
    moe = MoE(gate=gate, experts=FeedForward(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS).double())
    x_TD, noise = torch.randn(1, WIDTH).double(), torch.full((1, WIDTH), draw, dtype=torch.float64)
    factor = 0.75 + 0.5 * 0.5 * (1 + math.erf(draw / math.sqrt(2)))
    plain.w_gate.data.copy_(gate.w_gate * factor)
    y_TD, jittered = moe(x_TD, None, noise)
    assert_close(jittered.sums.z, plain(x_TD).sums.z)
    assert_close(jittered.sums.probability_E, plain(x_TD).sums.probability_E)
    assert_close(y_TD, moe.experts(x_TD, jittered))


def test_jitter_stops_in_evaluation():
    gate, x_TD = a_topk(k=2, jitter=0.5).eval(), torch.randn(9, WIDTH, dtype=torch.float64)
    plain = a_topk(k=2)
    plain.load_state_dict(gate.state_dict())
    assert torch.equal(gate(x_TD).weight_N, plain(x_TD).weight_N)


def test_a_fresh_gate_spreads_tokens_over_the_experts():
    gate = SoftmaxTopK(width=64, num_experts=8, k=1)
    count_E = gate(torch.randn(4000, 64)).sums.count_E
    assert 300 < count_E.min() <= count_E.max() < 800


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, r"k \(0\) must be between 1 and num_experts \(6\)"),
        ({"k": 7}, r"k \(7\) must be between 1 and num_experts \(6\)"),
        ({"k": 1, "jitter": 1.0}, r"jitter \(1.0\) must be at least 0 and below 1"),
        ({"k": 1, "jitter": float("nan")}, r"jitter \(nan\) must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxTopK(width=WIDTH, num_experts=NUM_EXPERTS, **wrong)


def test_noise_that_would_not_be_used_is_refused():
    with pytest.raises(ValueError, match="noise: a softmax top-k gate without jitter uses none; pass None"):
        a_topk(k=2)(torch.randn(3, WIDTH).double(), None, torch.randn(3, WIDTH))
