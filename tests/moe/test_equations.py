"""Equations 1 to 11 of the paper, one by one, against the formulas as they read: values and gradients."""

import math

import pytest
import torch

from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.gating.softmax import Softmax
from sparsegate.moe.kernels.noisy_choice import probability_in_topk
from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, a_batch, a_gate, a_moe, gradients
from tests.helpers.tolerances import assert_close

KS = [1, 2, 4, NUM_EXPERTS]


def noisy(moe: MoE, batch):
    gate = moe.gate
    return oracle.noisy_logits(batch.x_TD, gate.w_gate, gate.w_noise, batch.noise_TE, gate.noise_epsilon)


@pytest.mark.parametrize("k", KS)
def test_eq_1_the_output_is_the_dense_sum_over_all_experts(k):
    moe, batch = a_moe(k=k), a_batch(9)
    y, _ = moe(batch.x_TD, None, batch.noise_TE)
    gates_TE = oracle.gates(noisy(moe, batch)[2], k)
    dense = oracle.mixture(batch.x_TD, gates_TE, oracle.feed_forward(moe.experts.w_in, moe.experts.w_out))
    assert_close(y, dense)

    of = (batch.x_TD, *moe.parameters())
    ours = gradients((y * batch.cotangent_TD).sum(), *of)
    theirs = gradients((dense * batch.cotangent_TD).sum(), *of)
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient)


def test_eq_2_softmax_gating_weighs_every_expert():
    gate = a_gate("softmax")
    x_TD = a_batch(7).x_TD
    routing = gate(x_TD)
    logits_TE = x_TD @ gate.w_gate
    expected_TE = logits_TE.exp() / logits_TE.exp().sum(dim=1, keepdim=True)
    assert_close(routing.weight_N.reshape(7, NUM_EXPERTS), expected_TE)
    assert routing.expert_N.reshape(7, NUM_EXPERTS).tolist() == [list(range(NUM_EXPERTS))] * 7

    cotangent_TE = torch.randn(7, NUM_EXPERTS, dtype=torch.float64)
    ours = gradients((routing.weight_N * cotangent_TE.flatten()).sum(), x_TD, gate.w_gate)
    theirs = gradients((expected_TE * cotangent_TE).sum(), x_TD, gate.w_gate)
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("k", KS)
def test_eq_3_4_5_the_gates_are_the_softmax_over_the_k_best_noisy_logits(k):
    moe, batch = a_moe(k=k), a_batch(12)
    _, routing = moe(batch.x_TD, None, batch.noise_TE)
    _, _, noisy_TE = noisy(moe, batch)
    assert_close(oracle.dense_gates(routing), oracle.gates(noisy_TE, k))
    kept = [sorted(oracle.keep_topk(row, k)) for row in noisy_TE]
    assert [sorted(row) for row in routing.expert_N.reshape(12, k).tolist()] == kept


def test_eq_4_the_noise_has_the_stated_deviation():
    gate = a_gate("noisy_topk")
    x_TD = a_batch(3).x_TD.detach()
    std_TE = oracle.softplus(x_TD @ gate.w_noise)
    # With one noisy logit per expert pair, G gives back the difference of the two that were kept.
    routing = gate(x_TD.repeat(40_000, 1))
    weight_TK = routing.weight_N.reshape(-1, 2)
    difference_T = (weight_TK[:, 0] / weight_TK[:, 1]).log()
    expert_TK = routing.expert_N.reshape(-1, 2)
    noise_TE = torch.randn(40_000, 3, NUM_EXPERTS, dtype=torch.float64)
    top_TK, chosen_TK = (x_TD @ gate.w_gate + noise_TE * std_TE).topk(2)
    expected_T = top_TK[..., 0] - top_TK[..., 1]
    for token in range(3):
        drawn = difference_T.reshape(40_000, 3)[:, token]
        assert abs(drawn.mean() - expected_T[:, token].mean()) < 0.02
        assert abs(drawn.std() - expected_T[:, token].std()) < 0.02
        shares = [
            torch.bincount(e[:, token].flatten(), minlength=NUM_EXPERTS) / 40_000
            for e in (expert_TK.reshape(40_000, 3, 2), chosen_TK)
        ]
        assert (shares[0] - shares[1]).abs().max() < 0.02


@pytest.mark.parametrize("k", KS)
def test_eq_6_importance_is_the_sum_of_the_gates_and_adds_up_to_the_number_of_tokens(k):
    moe, batch = a_moe(k=k), a_batch(12)
    _, routing = moe(batch.x_TD, None, batch.noise_TE)
    gates_TE = oracle.gates(noisy(moe, batch)[2], k)
    assert_close(routing.sums.importance_E, gates_TE.sum(dim=0))
    assert_close(routing.sums.importance_E.sum(), torch.tensor(12.0), dtype=torch.float64)


@pytest.mark.parametrize("k", KS[:-1])
def test_eq_8_9_10_the_load_is_the_sum_of_the_probabilities(k):
    moe, batch = a_moe(k=k), a_batch(9)
    _, routing = moe(batch.x_TD, None, batch.noise_TE)
    expected_E = oracle.probability_in_topk(*noisy(moe, batch), k).sum(dim=0)
    assert_close(routing.sums.load_E, expected_E)

    weight_E = torch.randn(NUM_EXPERTS, dtype=torch.float64)
    of = (batch.x_TD, moe.gate.w_gate, moe.gate.w_noise)
    ours = gradients((routing.sums.load_E * weight_E).sum(), *of)
    theirs = gradients((expected_E * weight_E).sum(), *of)
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("k", KS[:-1])
def test_eq_8_the_probability_is_the_share_of_redraws_of_one_noise_that_keep_the_expert(k):
    num_draws = 20_000
    clean_TE = torch.randn(3, NUM_EXPERTS, dtype=torch.float64)
    std_TE = torch.rand(3, NUM_EXPERTS, dtype=torch.float64) + 0.3
    noisy_TE = clean_TE + std_TE * torch.randn(3, NUM_EXPERTS, dtype=torch.float64)
    top_TK1, expert_TK1 = noisy_TE.topk(k + 1)
    p_TE = probability_in_topk(clean_TE, std_TE, top_TK1, expert_TK1[:, :k])
    for expert in range(NUM_EXPERTS):
        redrawn = noisy_TE.repeat(num_draws, 1, 1)
        noise = torch.randn(num_draws, 3, dtype=torch.float64)
        redrawn[:, :, expert] = clean_TE[:, expert] + std_TE[:, expert] * noise
        share_T = (redrawn.topk(k).indices == expert).any(dim=-1).double().mean(dim=0)
        assert (share_T - p_TE[:, expert]).abs().max() < 4.5 * 0.5 / math.sqrt(num_draws)


def test_eq_10_the_load_is_unbiased_for_the_counts_and_adds_up_to_k_per_token():
    gate = NoisyTopK(width=WIDTH, num_experts=16, k=4, dtype=torch.float64)
    torch.nn.init.normal_(gate.w_gate, std=0.3)
    torch.nn.init.normal_(gate.w_noise, std=0.3)
    with torch.no_grad():
        sums = gate(torch.randn(20_000, WIDTH, dtype=torch.float64)).sums
    assert abs(float(sums.load_E.sum()) / (4 * 20_000) - 1) < 0.01
    assert abs(sums.load_E / sums.count_E - 1).max() < 0.05
    assert torch.corrcoef(torch.stack([sums.load_E, sums.count_E.double()]))[0, 1] > 0.99


def test_eq_10_the_threshold_excludes_the_expert_itself():
    """One threshold for all, the k-th of all, is a known mistake: its loads add up to too little."""
    gate = NoisyTopK(width=WIDTH, num_experts=16, k=4, dtype=torch.float64)
    x_TD, noise_TE = (torch.randn(5_000, n, dtype=torch.float64) for n in (WIDTH, 16))
    clean_TE, std_TE, noisy_TE = oracle.noisy_logits(x_TD, gate.w_gate, gate.w_noise, noise_TE)
    kth_T1 = noisy_TE.topk(4).values[:, -1:]
    mistaken = torch.special.ndtr((clean_TE - kth_T1) / std_TE).sum() / (4 * 5_000)
    ours = gate(x_TD, None, noise_TE).sums.load_E.sum() / (4 * 5_000)
    assert mistaken < 0.95 < 0.98 < ours < 1.02


@pytest.mark.parametrize("k", KS)
def test_eq_7_and_11_the_losses_are_squared_variation_over_the_experts(k):
    moe, batch = a_moe(k=k), a_batch(9)
    _, routing = moe(batch.x_TD, None, batch.noise_TE)
    logits = noisy(moe, batch)
    importance_E = oracle.gates(logits[2], k).sum(dim=0)
    of = (batch.x_TD, moe.gate.w_gate, moe.gate.w_noise)
    pairs = [(importance_loss(routing), oracle.squared_cv(importance_E))]
    if k < NUM_EXPERTS:
        load_E = oracle.probability_in_topk(*logits, k).sum(dim=0)
        pairs.append((load_loss(routing), oracle.squared_cv(load_E)))
    for ours, theirs in pairs:
        assert_close(ours, theirs)
        for our_gradient, their_gradient in zip(gradients(ours, *of), gradients(theirs, *of), strict=True):
            assert_close(our_gradient, their_gradient)


def test_importance_loss_is_what_the_sum_of_squared_shares_says():
    """Importance always sums to |X|, so CV² = n * sum((I_i / |X|)²) - 1."""
    moe, batch = a_moe(k=3), a_batch(40)
    _, routing = moe(batch.x_TD)
    share_E = routing.sums.importance_E / 40
    assert_close(importance_loss(routing), NUM_EXPERTS * (share_E**2).sum() - 1)


def test_zero_weights_and_noise_start_with_balanced_experts():
    gate = NoisyTopK(width=WIDTH, num_experts=16, k=4)
    assert not gate.w_gate.any()
    assert not gate.w_noise.any()
    routing = gate(torch.randn(4096, WIDTH))
    assert routing.sums.count_E.min() > 0.85 * 4 * 4096 / 16
    assert importance_loss(routing) < 0.01
    assert load_loss(routing) < 0.01


def test_at_zero_weights_both_weights_receive_a_gradient():
    moe = MoE.noisy_topk(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, k=2)
    y, routing = moe(torch.randn(32, WIDTH))
    for loss in (y.square().sum(), importance_loss(routing), load_loss(routing)):
        for gradient in gradients(loss, moe.gate.w_gate, moe.gate.w_noise):
            assert gradient.abs().max() > 0


def test_with_one_expert_per_token_the_task_trains_no_gate_and_the_losses_do():
    moe, batch = a_moe(k=1), a_batch(16)
    y, routing = moe(batch.x_TD, None, batch.noise_TE)
    assert (routing.weight_N == 1).all()
    assert not torch.cat(gradients((y * batch.cotangent_TD).sum(), moe.gate.w_gate, moe.gate.w_noise)).any()
    assert torch.cat(gradients(load_loss(routing), moe.gate.w_gate, moe.gate.w_noise)).any()


def test_as_the_noise_vanishes_the_load_becomes_the_count():
    gate = a_gate("noisy_topk")
    torch.nn.init.constant_(gate.w_noise, -60.0)
    routing = gate(torch.rand(50, WIDTH, dtype=torch.float64) + 0.1)
    assert_close(routing.sums.load_E, routing.sums.count_E)


def test_where_every_expert_is_chosen_noise_decides_nothing_but_weights():
    noisy_gate = a_gate("noisy_all")
    dense_gate = Softmax(width=WIDTH, num_experts=NUM_EXPERTS, dtype=torch.float64)
    dense_gate.load_state_dict({"w_gate": noisy_gate.w_gate})
    x_TD = a_batch(8).x_TD
    noiseless = oracle.dense_gates(noisy_gate(x_TD, None, torch.zeros(8, NUM_EXPERTS)))
    assert_close(noiseless, oracle.dense_gates(dense_gate(x_TD)), dtype=torch.float64)
    assert torch.equal(noisy_gate(x_TD).sums.load_E, torch.full((NUM_EXPERTS,), 8.0, dtype=torch.float64))
