"""Sigmoid scores with a balancing bias, against the formulas as they read."""

import math

import pytest
import torch

from sparsegate import SigmoidTopK
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, dense, gradients
from tests.helpers.tolerances import assert_close


def a_gate(**options) -> SigmoidTopK:
    gate = SigmoidTopK(width=WIDTH, num_experts=NUM_EXPERTS, **{"k": 2, "dtype": torch.float64, **options})
    torch.nn.init.normal_(gate.w_gate)
    torch.nn.init.normal_(gate.bias, std=0.3)
    return gate


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_bias_chooses_and_the_scores_weigh(scale):
    gate = a_gate(scale=scale)
    x_TD = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    score_TE = 1 / (1 + torch.exp(-(x_TD @ gate.w_gate)))
    rows, other_choice = [], False
    for score_E in score_TE:
        ranking = sorted(range(NUM_EXPERTS), key=lambda e: -(score_E[e] + gate.bias[e]).item())
        other_choice |= set(ranking[:2]) != set(score_E.topk(2).indices.tolist())
        is_best_E = torch.tensor([e in ranking[:2] for e in range(NUM_EXPERTS)])
        kept_E = torch.where(is_best_E, score_E, 0.0)
        rows.append(scale * kept_E / kept_E.sum())
    expected_TE = torch.stack(rows)
    assert other_choice
    routing = gate(x_TD)
    assert_close(dense(routing), expected_TE)
    assert_close(routing.sums.probability_E, (score_TE / score_TE.sum(dim=1, keepdim=True)).sum(dim=0))
    assert_close(routing.sums.z, score_TE.sum(dim=1).log().square().sum())
    cotangent_TE = torch.randn_like(expected_TE)
    for ours, theirs in zip(
        gradients((dense(routing) * cotangent_TE).sum(), x_TD, gate.w_gate),
        gradients((expected_TE * cotangent_TE).sum(), x_TD, gate.w_gate),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_a_step_moves_the_bias_against_the_counts_by_the_rate():
    gate = a_gate(bias_rate=0.25)
    before_E = gate.bias.clone()
    sums = gate(torch.randn(40, WIDTH, dtype=torch.float64)).sums
    gate.after_step(sums)
    mean = 2 * 40 / NUM_EXPERTS
    for before, after, count in zip(before_E, gate.bias, sums.count_E.tolist(), strict=True):
        direction = 0 if count == mean else math.copysign(1, mean - count)
        assert after == pytest.approx(float(before) + 0.25 * direction)


def test_steps_balance_a_gate_that_sends_everything_to_few():
    gate = a_gate(bias_rate=0.003)
    with torch.no_grad():
        gate.bias.zero_()
        gate.w_gate[:, :2] += 1.0
    x_TD = torch.randn(600, WIDTH, dtype=torch.float64).abs() / 3
    unbalanced = gate(x_TD).sums.count_E
    for _ in range(600):
        gate.after_step(gate(x_TD).sums)
    balanced = gate(x_TD).sums.count_E
    assert unbalanced.max() > 2 * 200
    assert balanced.max() < 1.15 * 200


def test_the_bias_is_no_parameter_and_is_stored():
    gate = a_gate()
    assert [name for name, _ in gate.named_parameters()] == ["w_gate"]
    assert set(gate.state_dict()) == {"w_gate", "bias"}
    gate = SigmoidTopK(width=2, num_experts=3, k=1, dtype=torch.bfloat16)
    assert gate.bias.dtype == gate.bfloat16().bias.dtype == gate.double().bias.dtype == torch.float32
    assert gate.w_gate.dtype == torch.float64


def test_scores_that_vanish_have_weights_all_the_same():
    gate = a_gate(dtype=torch.float32)
    with torch.no_grad():
        gate.w_gate.fill_(-1000.0)
    weight_TE = dense(gate(torch.ones(1, WIDTH)))
    assert weight_TE.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, r"k \(0\) must be between 1 and num_experts \(6\)"),
        ({"bias_rate": -1.0}, r"bias_rate \(-1.0\) must not be negative"),
        ({"bias_rate": float("nan")}, r"bias_rate \(nan\) must not be negative"),
        ({"scale": 0.0}, r"scale \(0.0\) must be above 0 and finite"),
        ({"scale": float("inf")}, r"scale \(inf\) must be above 0 and finite"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        a_gate(**wrong)


def test_noise_is_refused():
    with pytest.raises(ValueError, match="noise: a sigmoid gate uses none; pass None"):
        a_gate()(torch.randn(3, WIDTH).double(), None, torch.randn(3, NUM_EXPERTS))
