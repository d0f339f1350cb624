"""SwiGLU experts: the formula as it reads."""

import pytest
import torch

from sparsegate import SwiGLU
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, a_routing, gradients
from tests.helpers.tolerances import assert_close


def test_an_expert_is_its_formula_in_value_and_gradient():
    experts = SwiGLU(width=WIDTH, hidden=4, num_experts=NUM_EXPERTS, dtype=torch.float64)
    x_TD = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    expert_T1 = torch.tensor([[5], [0], [1], [1], [4], [0], [5]])
    y_TD = experts(x_TD, a_routing(expert_T1, torch.ones(7, 1, dtype=torch.float64)))
    rows = []
    for x_D, expert in zip(x_TD, expert_T1[:, 0].tolist(), strict=True):
        swish, linear = x_D @ experts.w_in[expert, :, :4], x_D @ experts.w_in[expert, :, 4:]
        rows.append((swish / (1 + torch.exp(-swish)) * linear) @ experts.w_out[expert])
    expected_TD = torch.stack(rows)
    assert_close(y_TD, expected_TD)
    of = (x_TD, *experts.parameters())
    for ours, theirs in zip(
        gradients(y_TD.square().sum(), *of), gradients(expected_TD.square().sum(), *of), strict=True
    ):
        assert_close(ours, theirs)


def test_a_pair_costs_three_products_of_width_and_hidden():
    assert SwiGLU(width=5, hidden=4, num_experts=2).ops_per_pair() == 3 * 5 * 4


def test_activations_keep_their_size_at_the_start():
    experts = SwiGLU(width=256, hidden=512, num_experts=1)
    y_TD = experts(
        torch.randn(200, 256), a_routing(torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, 1))
    )
    assert 0.3 < y_TD.std() < 1


@pytest.mark.parametrize("wrong", [{"width": 0}, {"hidden": 0}, {"num_experts": 0}])
def test_sizes_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be >= 1"):
        SwiGLU(**{"width": 2, "hidden": 3, "num_experts": 4, **wrong})
