"""The balance losses: squared variation, its gradient, and sums that are added before they are squared."""

import math

import pytest
import torch

from sparsegate import SoftmaxTopK
from sparsegate.moe.losses import importance_loss, load_loss, squared_cv, switch_loss, z_loss
from tests.helpers import moe_oracle as oracle
from tests.helpers.derivatives import assert_derivatives
from tests.helpers.moe_cases import a_batch, a_moe, gradients
from tests.helpers.tolerances import assert_close


def test_squared_cv_is_population_variance_over_squared_mean():
    value_E = torch.rand(7, dtype=torch.float64) + 0.1
    assert_close(squared_cv(value_E), value_E.var(unbiased=False) / value_E.mean() ** 2)
    assert_close(squared_cv(value_E), oracle.squared_cv(value_E))


def test_its_gradient_is_the_formulas():
    value_E = (torch.rand(7, dtype=torch.float64) + 0.1).requires_grad_()
    mean, variance = value_E.mean(), value_E.var(unbiased=False)
    expected_E = 2 * (value_E - mean) / (7 * mean**2) - 2 * variance / (7 * mean**3)
    (ours_E,) = gradients(squared_cv(value_E), value_E)
    assert_close(ours_E, expected_E)
    assert_derivatives(squared_cv, value_E)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3, 1e9])
def test_the_scale_of_the_loads_makes_no_difference(scale):
    value_E = torch.rand(7) + 0.1
    assert_close(squared_cv(scale * value_E), squared_cv(value_E))


@pytest.mark.parametrize("num_experts", [1, 2, 17])
def test_equal_loads_cost_nothing_and_pull_nowhere(num_experts):
    for level in (0.0, 1e-3, 5.0, 1e6):
        value_E = torch.full((num_experts,), level, requires_grad=True)
        loss = squared_cv(value_E)
        assert loss == 0
        assert not gradients(loss, value_E)[0].any()


def test_one_expert_with_everything_costs_n_minus_one():
    for num_experts in (2, 16, 1000):
        value_E = torch.zeros(num_experts)
        value_E[1] = 30.0
        assert_close(squared_cv(value_E), torch.tensor(num_experts - 1.0))


def test_the_losses_take_a_routing_and_its_sums_alike():
    moe, batch = a_moe(), a_batch(6)
    _, routing = moe(batch.x_TD, None, batch.noise_TE)
    assert importance_loss(routing) == importance_loss(routing.sums) == squared_cv(routing.sums.importance_E)
    assert load_loss(routing) == load_loss(routing.sums) == squared_cv(routing.sums.load_E)


def test_sums_of_parts_add_up_to_the_whole_in_value_and_gradient():
    moe, batch = a_moe(), a_batch(12)
    _, whole = moe(batch.x_TD, None, batch.noise_TE)
    parts = [moe(batch.x_TD[s], None, batch.noise_TE[s])[1].sums for s in (slice(0, 5), slice(5, 12))]
    total = parts[0] + parts[1]
    assert torch.equal(total.count_E, whole.sums.count_E)
    assert total.num_tokens == whole.sums.num_tokens == 12
    of = (batch.x_TD, moe.gate.w_gate, moe.gate.w_noise)
    for loss in (importance_loss, load_loss, switch_loss, z_loss):
        assert_close(loss(total), loss(whole))
        for our_gradient, their_gradient in zip(
            gradients(loss(total), *of), gradients(loss(whole), *of), strict=True
        ):
            assert_close(our_gradient, their_gradient)


def test_the_mean_over_parts_is_another_loss():
    """Why sums are added first: parts that are each unbalanced may be balanced together."""
    parts = torch.tensor([[8.0, 0.0], [0.0, 8.0]])
    assert squared_cv(parts.sum(dim=0)) == 0
    assert_close(torch.stack([squared_cv(part) for part in parts]).mean(), torch.tensor(1.0))


def test_the_load_of_evaluation_carries_no_gradient_and_importance_does():
    moe, batch = a_moe().eval(), a_batch(9)
    _, routing = moe(batch.x_TD)
    assert not load_loss(routing).requires_grad
    assert gradients(importance_loss(routing), moe.gate.w_gate)[0].any()


def test_the_z_loss_is_the_mean_squared_log_sum_exp_of_real_tokens():
    gate = SoftmaxTopK(width=3, num_experts=4, k=2, dtype=torch.float64)
    x_TD = 3 * torch.randn(5, 3, dtype=torch.float64)
    mask_T = torch.tensor([True, False, True, True, False])
    logits = (x_TD @ gate.w_gate)[mask_T].tolist()
    expected = sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits) / 3
    assert_close(z_loss(gate(x_TD, mask_T)), torch.tensor(expected, dtype=torch.float64))
    assert_derivatives(lambda x: z_loss(gate(x, mask_T)), x_TD.requires_grad_())


@pytest.mark.parametrize("k", [1, 3])
def test_the_switch_loss_is_experts_times_share_times_mean_probability(k):
    gate = SoftmaxTopK(width=3, num_experts=4, k=k, dtype=torch.float64)
    x_TD = 3 * torch.randn(7, 3, dtype=torch.float64)
    probability_TE = (x_TD @ gate.w_gate).softmax(dim=1).tolist()
    share_E, mean_E = [0.0] * 4, [0.0] * 4
    for row in probability_TE:
        for expert in sorted(range(4), key=lambda i: -row[i])[:k]:
            share_E[expert] += 1 / (7 * k)
        for expert in range(4):
            mean_E[expert] += row[expert] / 7
    expected = 4 * sum(share * mean for share, mean in zip(share_E, mean_E, strict=True))
    assert_close(switch_loss(gate(x_TD)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 2])
def test_the_switch_loss_is_1_at_balance_and_experts_over_k_at_collapse(k):
    gate = SoftmaxTopK(width=4, num_experts=4, k=k, dtype=torch.float64)
    gate.w_gate.data.copy_(torch.eye(4) + 0.5 * torch.eye(4).roll(1, dims=1))
    one_hot_TD = torch.eye(4, dtype=torch.float64)
    assert_close(switch_loss(gate(one_hot_TD.repeat(3, 1))), torch.tensor(1.0))
    gate.w_gate.data.zero_()
    gate.w_gate.data[:, :k] = 50.0
    assert_close(switch_loss(gate(one_hot_TD)), torch.tensor(4.0 / k))
