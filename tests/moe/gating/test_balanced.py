"""Strictly balanced gating: equations 15 to 20 as they read, and what the paper leaves open."""

import math

import pytest
import torch

from sparsegate import Balanced, FeedForward, MoE, importance_loss, load_loss, threshold_loss
from sparsegate.moe.gating.softmax_topk import SoftmaxTopK
from tests.helpers import moe_oracle as oracle
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, dense, gradients
from tests.helpers.tolerances import assert_close

NUM_TOKENS, K = 12, 2


def a_balanced(**options) -> Balanced:
    gate = Balanced(width=WIDTH, num_experts=NUM_EXPERTS, k=K, dtype=torch.float64, **options)
    torch.nn.init.normal_(gate.w_gate)
    torch.nn.init.normal_(gate.log_threshold, mean=-1.8, std=0.4)
    return gate


def some_tokens(num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH, dtype=torch.float64, requires_grad=True)


def softmax(logit_TE):
    """Eq. 15."""
    exp_TE = torch.exp(logit_TE)
    return exp_TE / exp_TE.sum(dim=1, keepdim=True)


def top_tokens(probability_TE, m):
    """Eq. 18: M_batchwise, by sorting."""
    mask_TE = torch.zeros_like(probability_TE)
    for expert in range(probability_TE.shape[1]):
        values = probability_TE[:, expert].tolist()
        for token in sorted(range(len(values)), key=lambda t: -values[t])[:m]:
            mask_TE[token, expert] = 1
    return mask_TE


def renormalized(probability_TE, mask_TE):
    """Eq. 16, 0/0 read as 0."""
    rows = []
    for probability_E, mask_E in zip(probability_TE, mask_TE, strict=True):
        total = (probability_E * mask_E).sum()
        rows.append(probability_E * mask_E / total if mask_E.any() else torch.zeros_like(probability_E))
    return torch.stack(rows)


def test_eq_15_16_18_in_training_each_expert_takes_its_m_best_tokens():
    gate, x_TD = a_balanced(), some_tokens()
    probability_TE = softmax(x_TD @ gate.w_gate)
    expected_TE = renormalized(probability_TE, top_tokens(probability_TE, K * NUM_TOKENS // NUM_EXPERTS))
    routing = gate(x_TD)
    assert routing.sums.count_E.tolist() == [K * NUM_TOKENS // NUM_EXPERTS] * NUM_EXPERTS
    assert load_loss(routing) == 0
    assert_close(dense(routing), expected_TE)
    cotangent_TE = torch.randn(NUM_TOKENS, NUM_EXPERTS, dtype=torch.float64)
    ours = (dense(routing) * cotangent_TE).sum() + importance_loss(routing)
    theirs = (expected_TE * cotangent_TE).sum() + oracle.squared_cv(expected_TE.sum(dim=0))
    for our_gradient, their_gradient in zip(
        gradients(ours, x_TD, gate.w_gate), gradients(theirs, x_TD, gate.w_gate), strict=True
    ):
        assert_close(our_gradient, their_gradient)


def test_eq_17_with_a_mask_over_each_tokens_experts_eq_16_is_softmax_after_top_k():
    """M = TopK in eq. 16 gives the gate of eq. 3 without noise."""
    gate, x_TD = SoftmaxTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=K, dtype=torch.float64), some_tokens()
    probability_TE = softmax(x_TD @ gate.w_gate)
    mask_TE = top_tokens(probability_TE.T, K).T
    assert_close(dense(gate(x_TD)), renormalized(probability_TE, mask_TE))


@pytest.mark.parametrize("most_per_token", [None, NUM_EXPERTS, 3, 1])
def test_eq_19_in_evaluation_a_token_goes_to_the_experts_above_their_thresholds(most_per_token):
    gate, x_TD = a_balanced(most_per_token=most_per_token).eval(), some_tokens()
    probability_TE = softmax(x_TD @ gate.w_gate).detach()
    mask_TE = (probability_TE > torch.exp(gate.log_threshold)).double()
    for probability_E, mask_E in zip(probability_TE, mask_TE, strict=True):
        passed = [e for e in range(NUM_EXPERTS) if mask_E[e]]
        for expert in sorted(passed, key=lambda e: -float(probability_E[e]))[most_per_token or NUM_EXPERTS :]:
            mask_E[expert] = 0
    assert 0 < mask_TE.sum() < mask_TE.numel()
    routing = gate(x_TD)
    assert_close(dense(routing), renormalized(probability_TE, mask_TE))
    assert routing.sums.num_unrouted == int((mask_TE.sum(dim=1) == 0).sum())
    assert routing.sums.count_E.tolist() == mask_TE.sum(dim=0).tolist()


def test_eq_20_the_threshold_loss_and_its_gradient():
    gate, x_TD = a_balanced(), some_tokens()
    threshold_E = torch.exp(gate.log_threshold)
    probability_TE = softmax(x_TD.detach() @ gate.w_gate.detach())
    chosen_TE = top_tokens(probability_TE, K * NUM_TOKENS // NUM_EXPERTS)
    total = 0
    for probability_E, chosen_E in zip(probability_TE, chosen_TE, strict=True):
        for p, is_chosen, threshold in zip(probability_E, chosen_E, threshold_E, strict=True):
            total = total + ((1.0 if p > threshold else 0.0) - is_chosen) * (p - threshold)
    loss = threshold_loss(gate(x_TD))
    assert loss > 0
    assert_close(loss, total / NUM_TOKENS)
    ours = gradients(loss, gate.log_threshold, x_TD, gate.w_gate)
    assert_close(ours[0], gradients(total / NUM_TOKENS, gate.log_threshold)[0])
    assert not ours[1].any()
    assert not ours[2].any()


def test_descent_on_the_threshold_loss_makes_both_masks_agree():
    gate, x_TD = a_balanced(), some_tokens(96).detach()
    optimizer = torch.optim.Adam([gate.log_threshold], lr=0.02)
    for step in range(600):
        optimizer.zero_grad()
        loss = threshold_loss(gate(x_TD))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 600)
        optimizer.step()
    training = dense(gate(x_TD))
    evaluation = dense(gate.eval()(x_TD))
    disagree_TE = (training > 0) != (evaluation > 0)
    # A threshold lies between the m-th and the next value; descent stops within a step of it.
    assert disagree_TE.sum() <= 2
    assert loss < 1e-5


def test_training_takes_the_task_to_the_gate_and_only_the_threshold_loss_to_the_thresholds():
    gate, x_TD = a_balanced(), some_tokens()
    moe = MoE(
        gate=gate,
        experts=FeedForward(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, dtype=torch.float64),
    )
    y_TD, routing = moe(x_TD)
    task = y_TD.square().sum() + importance_loss(routing)
    w_gate, log_threshold = gradients(task, gate.w_gate, gate.log_threshold)
    assert w_gate.any()
    assert not log_threshold.any()
    assert gradients(threshold_loss(routing), gate.log_threshold)[0].any()


def test_a_token_that_no_expert_takes_has_the_output_zero_and_a_finite_gradient():
    gate, x_TD = a_balanced(), some_tokens()
    with torch.no_grad():
        gate.w_gate[:, :3] = 0.0
        x_TD[3] = x_TD[7] = 0.0  # of equal probabilities, all below their thresholds: others are better
        gate.log_threshold.clamp_min_(-1.7)
    moe = MoE(
        gate=gate,
        experts=FeedForward(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, dtype=torch.float64),
    )
    found = False
    for training in (True, False):
        y_TD, routing = moe.train(training)(x_TD)
        none_T = ~(dense(routing) > 0).any(dim=1)
        found = found or bool(none_T.any())
        assert routing.sums.num_unrouted == none_T.sum()
        assert not y_TD[none_T].any()
        for gradient in gradients(y_TD.square().sum() + importance_loss(routing), x_TD, *moe.parameters()):
            assert gradient.isfinite().all()
    assert found


def test_with_scope_the_tokens_of_a_block_compete_among_themselves():
    gate, x_TD = a_balanced(scope=4), some_tokens(10)
    whole_TE = dense(gate(x_TD))
    parts_TE = torch.cat([dense(gate(x_TD[start : start + 4])) for start in (0, 4, 8)])
    assert_close(whole_TE, parts_TE)
    gate.scope = None
    assert (dense(gate(x_TD)) - whole_TE).abs().max() > 1e-3


def test_micro_batches_of_whole_blocks_add_to_the_batch_in_losses_and_gradients():
    gate, x_TD = a_balanced(scope=4), some_tokens(12)
    whole = gate(x_TD).sums
    total = gate(x_TD[:4]).sums + gate(x_TD[4:]).sums
    for loss in (importance_loss, threshold_loss):
        assert_close(loss(total), loss(whole))
        for ours, theirs in zip(
            gradients(loss(total), x_TD, *gate.parameters()),
            gradients(loss(whole), x_TD, *gate.parameters()),
            strict=True,
        ):
            assert_close(ours, theirs)


def test_evaluation_with_thresholds_that_were_never_trained_is_refused():
    gate = Balanced(width=WIDTH, num_experts=NUM_EXPERTS, k=K)
    gate(some_tokens().float())
    with pytest.raises(
        ValueError, match=r"^log_threshold \(-1.792 for every expert\) was never trained[^\n]*$"
    ):
        gate.eval()(some_tokens().float())
    with torch.no_grad():
        gate.log_threshold[0] += 1e-3
    gate(some_tokens().float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_so_it_is_after_a_conversion(dtype):
    for num_experts in (2, 6, 32, 1000):
        gate = Balanced(width=WIDTH, num_experts=num_experts, k=1).to(dtype).eval()
        with pytest.raises(ValueError, match="was never trained"):
            gate(torch.zeros(3, WIDTH, dtype=dtype))


def test_a_token_that_is_not_a_number_does_not_vanish_in_evaluation():
    gate = a_balanced().eval()
    x_TD = some_tokens().detach()
    x_TD[2] = torch.nan
    assert dense(gate(x_TD))[2].isnan().any()


def test_thresholds_start_at_the_probability_of_equal_experts():
    gate = Balanced(width=WIDTH, num_experts=NUM_EXPERTS, k=K)
    assert gate.log_threshold.tolist() == pytest.approx([-math.log(NUM_EXPERTS)] * NUM_EXPERTS)


def test_selection_over_the_batch_is_said_and_ends_in_evaluation():
    gate = a_balanced()
    assert gate.selects_over_batch
    assert not gate.eval().selects_over_batch


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 7}, r"k \(7\) must be between 1 and num_experts \(6\)"),
        ({"scope": 0}, r"scope \(0\) must be at least 1 token, or None for all tokens of a call"),
        ({"most_per_token": 0}, r"most_per_token \(0\) must be between 1 and num_experts \(6\), or None"),
        ({"most_per_token": 7}, r"most_per_token \(7\) must be between 1 and num_experts \(6\), or None"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Balanced(**{"width": WIDTH, "num_experts": NUM_EXPERTS, "k": K, **wrong})
