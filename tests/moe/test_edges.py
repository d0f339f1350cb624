"""The layer where others fail: few tokens, few experts, all in one place, numbers that are none."""

import pytest
import torch

from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, a_batch, a_moe, a_routing, gradients
from tests.helpers.tolerances import TOLERANCES, assert_close

in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@in_both_modes
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (2, 1), (2, 2), (5, 1), (5, 4), (5, 5)])
def test_few_tokens_and_few_experts_are_defined(num_tokens, num_experts, k, training):
    moe = a_moe(num_experts=num_experts, k=k).train(training)
    batch = a_batch(num_tokens, num_experts=num_experts)
    y_TD, routing = moe(batch.x_TD, None, batch.noise_TE)
    assert y_TD.shape == (num_tokens, WIDTH)
    assert routing.sums.count_E.sum() == k * num_tokens
    loss = y_TD.square().sum() + importance_loss(routing) + load_loss(routing)
    loss.backward()
    trained = [moe.gate.w_gate, moe.experts.w_in, moe.experts.w_out]
    for tensor in (batch.x_TD, *trained, *([moe.gate.w_noise] if training else [])):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert num_tokens or not tensor.grad.any()
    if num_tokens:
        logits_TE = oracle.noisy_logits(batch.x_TD, moe.gate.w_gate, moe.gate.w_noise, batch.noise_TE)
        gates_TE = oracle.gates(logits_TE[2] if training else logits_TE[0], k)
        experts = oracle.feed_forward(moe.experts.w_in, moe.experts.w_out)
        assert_close(y_TD, oracle.mixture(batch.x_TD, gates_TE, experts))


@in_both_modes
def test_one_expert_is_a_plain_network(training):
    moe, batch = a_moe(num_experts=1, k=1).train(training), a_batch(8, num_experts=1)
    y_TD, routing = moe(batch.x_TD, None, batch.noise_TE)
    assert_close(y_TD, (batch.x_TD @ moe.experts.w_in[0]).relu() @ moe.experts.w_out[0])
    assert importance_loss(routing) == load_loss(routing) == 0


@pytest.mark.parametrize(("k", "num_experts"), [(6, 5), (0, 5), (-1, 5), (1, 0)])
def test_a_choice_that_cannot_be_made_is_refused_at_construction_in_one_line(k, num_experts):
    with pytest.raises(ValueError, match=r"^(k|num_experts) \(-?\d\) must be [^\n]*$"):
        MoE.noisy_topk(width=WIDTH, hidden=3, num_experts=num_experts, k=k)


@in_both_modes
def test_all_tokens_to_one_expert_leave_the_others_a_gradient_of_zero(training):
    moe, batch = a_moe(k=1).train(training), a_batch(8)
    with torch.no_grad():
        batch.x_TD.abs_()
        moe.gate.w_gate.zero_()[:, 2] = 1e4
    y_TD, routing = moe(batch.x_TD, None, batch.noise_TE)
    assert routing.sums.count_E.tolist() == [0, 0, 8, 0, 0, 0]
    assert_close(y_TD, (batch.x_TD @ moe.experts.w_in[2]).relu() @ moe.experts.w_out[2])
    assert_close(importance_loss(routing), torch.tensor(NUM_EXPERTS - 1.0))
    others = [0, 1, 3, 4, 5]
    for gradient in gradients(y_TD.square().sum(), moe.experts.w_in, moe.experts.w_out):
        assert not gradient[others].any()
        assert gradient[2].any()


@in_both_modes
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_huge_logits_keep_everything_finite(logit, dtype, training):
    moe, batch = a_moe(dtype=dtype).train(training), a_batch(8, dtype=dtype)
    with torch.no_grad():
        batch.x_TD[:, 0] = 1
        moe.gate.w_gate[0] = logit * torch.tensor([1, -1, 1, 0.5, 0, -0.5])
        moe.gate.w_noise[0] = logit
    y_TD, routing = moe(batch.x_TD, None, batch.noise_TE)
    loss = y_TD.double().sum() + importance_loss(routing) + load_loss(routing)
    for value in (y_TD, loss, *gradients(loss, batch.x_TD, *moe.parameters())):
        assert value.isfinite().all()


def test_at_the_start_evaluation_is_deterministic_though_all_logits_tie():
    moe = MoE.noisy_topk(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, k=2).eval()
    x_TD = torch.randn(30, WIDTH)
    first, second = moe(x_TD), moe(x_TD)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].expert_N, second[1].expert_N)
    assert len(set(map(tuple, first[1].expert_N.reshape(30, 2).tolist()))) == 1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_in_evaluation_a_number_that_is_none_spoils_its_own_token_and_no_bit_of_another(value, dtype):
    """Compared at equal counts per expert: how many rows a product has may change how it rounds."""
    moe = a_moe(width=8, dtype=dtype).eval()
    spoilt_TD = torch.randn(9, 8, dtype=dtype)
    spoilt_TD[4, 1] = value
    y_spoilt_TD, routing = moe(spoilt_TD)

    chosen = routing.expert_N.reshape(9, 2)[4]
    wanted_E = torch.zeros(NUM_EXPERTS).index_fill(0, chosen, 9.0)
    sound_TD = spoilt_TD.clone()
    sound_TD[4] = (wanted_E @ torch.linalg.pinv(moe.gate.w_gate.detach().float())).to(dtype)
    y_sound_TD, sound_routing = moe(sound_TD)
    assert sound_routing.sums.count_E.tolist() == routing.sums.count_E.tolist()

    others = torch.arange(9) != 4
    assert torch.equal(y_spoilt_TD[others], y_sound_TD[others])
    assert y_sound_TD.isfinite().all()
    assert y_spoilt_TD[4].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 2, NUM_EXPERTS])
def test_a_number_that_is_none_never_hides(value, k):
    """Not even where a ReLU or a weight of zero could swallow it."""
    for seed in range(20):
        torch.manual_seed(seed)
        moe, x_TD = a_moe(k=k), torch.randn(4, WIDTH, dtype=torch.float64)
        x_TD[2, seed % WIDTH] = value
        for training in (True, False):
            y_TD, routing = moe.train(training)(x_TD)
            assert y_TD[2].isnan().all()
            assert y_TD[[0, 1, 3]].isfinite().all()
            assert not routing.sums.importance_E.isfinite().all()


def test_half_precision_overflows_in_the_experts_and_not_in_the_gate():
    """65,504 is float16's largest number: logits beyond it are held in float32."""
    gate = NoisyTopK(width=1, num_experts=3, k=2, dtype=torch.float16)
    with torch.no_grad():
        gate.w_gate.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    routing = gate(torch.full((1, 1), 6e4, dtype=torch.float16), None, torch.zeros(1, 3))
    assert routing.weight_N.tolist() == [1.0, 0.0]
    assert routing.expert_N.tolist() == [2, 1]


def test_a_kept_weight_that_is_zero_keeps_its_expert():
    """Pairs go by index: a weight that underflows to 0 still counts, and its expert still runs."""
    experts = FeedForward(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS)
    x_TD, weight_TK = torch.randn(3, WIDTH), torch.tensor([[1.0, 0.0]] * 3).requires_grad_()
    routing = a_routing(torch.tensor([[0, 4]] * 3), weight_TK)
    assert routing.sums.count_E.tolist() == [3, 0, 0, 0, 3, 0]
    (gradient,) = gradients(experts(x_TD, routing).sum(), weight_TK)
    assert gradient[:, 1].abs().min() > 0
