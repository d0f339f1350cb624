"""Noisy top-k gating where its numbers are extreme, and what it refuses."""

import pytest
import torch

from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.gating.softmax import Softmax
from sparsegate.moe.losses import importance_loss, load_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, gradients
from tests.helpers.tolerances import assert_close


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("k", 7, r"k \(7\) must be between 1 and num_experts \(6\)"),
        ("k", 0, r"k \(0\) must be between 1 and num_experts \(6\)"),
        ("num_experts", 0, r"num_experts \(0\) must be at least 1"),
        ("noise_epsilon", -0.1, r"noise_epsilon \(-0.1\) must not be negative"),
        ("noise_epsilon", float("nan"), r"noise_epsilon \(nan\) must not be negative"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        NoisyTopK(**{"width": WIDTH, "num_experts": NUM_EXPERTS, "k": 2, field: value})


def test_softmax_gating_refuses_noise_and_no_experts():
    gate = Softmax(width=WIDTH, num_experts=NUM_EXPERTS)
    with pytest.raises(ValueError, match="^noise: softmax gating uses none; pass None$"):
        gate(torch.randn(2, WIDTH), None, torch.randn(2, NUM_EXPERTS))
    with pytest.raises(ValueError, match=r"^num_experts \(0\) must be at least 1$"):
        Softmax(width=WIDTH, num_experts=0)


def gate_with(w_gate: float, w_noise: float, *, k: int = 2) -> NoisyTopK:
    """A gate over inputs of one: clean logits w_gate * (0, 1, 2, ...), every noise weight w_noise."""
    gate = NoisyTopK(width=1, num_experts=NUM_EXPERTS, k=k)
    with torch.no_grad():
        gate.w_gate.copy_(w_gate * torch.arange(NUM_EXPERTS))
        gate.w_noise.fill_(w_noise)
    return gate


def assert_finite(gate: NoisyTopK, noise_TE=None) -> None:
    x_TD = torch.ones(4, 1, requires_grad=True)
    routing = gate(x_TD, None, noise_TE)
    losses = (routing.weight_N.square().sum(), importance_loss(routing), load_loss(routing))
    for value in (routing.weight_N, routing.sums.load_E, *losses):
        assert value.isfinite().all()
    for loss in losses if gate.training else losses[:2]:
        for gradient in gradients(loss, x_TD, gate.w_gate, gate.w_noise):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("w_gate", [0.0, 1e4, -1e4, 1e8, 1e-8])
@pytest.mark.parametrize("w_noise", [0.0, -30.0, -100.0, -200.0, -1e4, 1e4])
def test_extreme_logits_and_vanished_noise_keep_everything_finite(w_gate, w_noise):
    assert_finite(gate_with(w_gate, w_noise))
    assert_finite(gate_with(w_gate, w_noise).eval())


def test_the_noise_of_a_vanished_deviation_is_zero_and_the_load_counts():
    gate = gate_with(1.0, -200.0)
    assert oracle.softplus(torch.tensor(-200.0)) == 0
    routing = gate(torch.ones(4, 1))
    assert routing.sums.load_E.tolist() == routing.sums.count_E.tolist() == [0, 0, 0, 0, 4, 4]


def test_equal_logits_without_noise_send_every_token_to_the_same_k_experts():
    gate = NoisyTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=2).eval()
    routing = gate(torch.randn(50, WIDTH))
    assert sorted(routing.sums.count_E.tolist()) == [0, 0, 0, 0, 50, 50]
    assert_close(routing.weight_N, torch.full((100,), 0.5))
    for loss in (importance_loss(routing), load_loss(routing)):
        assert_close(loss, torch.tensor(NUM_EXPERTS / 2 - 1))


def test_tied_logits_count_each_chosen_expert_once():
    """Membership goes by index: with noise zero all values tie, two are in, and P is Phi(0) for all."""
    gate = NoisyTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=2)
    routing = gate(torch.randn(8, WIDTH), None, torch.zeros(8, NUM_EXPERTS))
    assert routing.sums.count_E.sum() == 16
    assert_close(routing.sums.load_E, torch.full((NUM_EXPERTS,), 8 * 0.5))


def test_epsilon_widens_the_noise_by_itself():
    plain, wide = gate_with(1.0, 0.3), gate_with(1.0, 0.3)
    wide.noise_epsilon = 0.5
    noise_TE = torch.randn(6, NUM_EXPERTS)
    x_TD = torch.ones(6, 1)
    std = float(oracle.softplus(torch.tensor(0.3)))
    expected = plain(x_TD, None, noise_TE * (std + 0.5) / std)
    ours = wide(x_TD, None, noise_TE)
    assert torch.equal(ours.expert_N, expected.expert_N)
    assert_close(ours.weight_N, expected.weight_N)


def test_the_printed_form_tells_the_sizes():
    assert repr(NoisyTopK(width=3, num_experts=4, k=2)) == "NoisyTopK(width=3, num_experts=4, k=2)"
    assert repr(Softmax(width=3, num_experts=4)) == "Softmax(width=3, num_experts=4)"
