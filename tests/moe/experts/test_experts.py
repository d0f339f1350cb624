"""What every kind of experts promises."""

import pytest
import torch

from sparsegate.moe.experts.experts import Experts
from tests.helpers.moe_cases import EXPERTS, NUM_EXPERTS, WIDTH, a_routing, gradients, some_experts
from tests.helpers.tolerances import TOLERANCES, assert_close

EXPERT_TK = torch.tensor([[4, 0], [1, 2], [0, 1], [2, 4], [0, 1], [4, 1]])  # expert 3 receives nothing
MASK_T = torch.tensor([True, False, True, True, False, True])

pytestmark = pytest.mark.parametrize("kind", EXPERTS)


def one_by_one(experts: Experts, x_TD, expert_TK, weight_TK):
    """Eq. 1, every pair computed alone: one token, one expert, weight 1."""
    one = torch.ones(1, 1, dtype=weight_TK.dtype)

    def pair(x_D, expert):
        return experts(x_D[None], a_routing(expert.reshape(1, 1), one))[0]

    return torch.stack(
        [
            sum(weight * pair(x_D, expert) for expert, weight in zip(expert_K, weight_K, strict=True))
            for x_D, expert_K, weight_K in zip(x_TD, expert_TK, weight_TK, strict=True)
        ]
    )


def inputs(dtype=torch.float64):
    return (
        torch.randn(6, WIDTH, dtype=dtype, requires_grad=True),
        torch.rand(6, 2, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True),
    )


def test_the_output_is_the_weighted_sum_of_pairs_computed_alone(kind):
    experts = some_experts(kind)
    x_TD, weight_TK = inputs()
    ours = experts(x_TD, a_routing(EXPERT_TK, weight_TK))
    theirs = one_by_one(experts, x_TD, EXPERT_TK, weight_TK)
    assert_close(ours, theirs)
    cotangent_TD = torch.randn(6, WIDTH, dtype=torch.float64)
    of = (x_TD, weight_TK, *experts.parameters())
    our_gradients = gradients((ours * cotangent_TD).sum(), *of)
    their_gradients = gradients((theirs * cotangent_TD).sum(), *of)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype_computes_the_float64_values_up_to_its_rounding(kind, dtype):
    experts = some_experts(kind, dtype=dtype)
    x_TD, weight_TK = inputs(dtype)
    y_TD = experts(x_TD, a_routing(EXPERT_TK, weight_TK))
    assert y_TD.dtype == dtype
    of = (x_TD, weight_TK, *experts.parameters())
    ours = gradients(y_TD.double().sum(), *of)
    assert [g.dtype for g in ours] == [t.dtype for t in of]

    exact = some_experts(kind)
    exact.load_state_dict({name: value.double() for name, value in experts.state_dict().items()})
    x_exact, weight_exact = (t.detach().double().requires_grad_() for t in (x_TD, weight_TK))
    y_exact = exact(x_exact, a_routing(EXPERT_TK, weight_exact))
    assert_close(y_TD, y_exact)
    theirs = gradients(y_exact.sum(), x_exact, weight_exact, *exact.parameters())
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient, dtype=dtype, scale=4)


def test_padding_leaves_no_trace_even_if_it_is_nan(kind):
    experts = some_experts(kind)
    x_TD, weight_TK = inputs()
    cotangent_TD = torch.randn(6, WIDTH, dtype=torch.float64)
    x_nan_TD = x_TD.detach().masked_fill(~MASK_T[:, None], torch.nan).requires_grad_()
    cotangent_nan_TD = cotangent_TD.masked_fill(~MASK_T[:, None], torch.nan)
    y_TD = experts(x_nan_TD, a_routing(EXPERT_TK, weight_TK, mask_T=MASK_T))
    without_TD = experts(x_TD[MASK_T], a_routing(EXPERT_TK[MASK_T], weight_TK[MASK_T]))
    assert torch.equal(y_TD[MASK_T], without_TD)
    assert not y_TD[~MASK_T].any()

    ours = torch.autograd.grad(y_TD, (x_nan_TD, weight_TK, *experts.parameters()), cotangent_nan_TD)
    theirs = torch.autograd.grad(
        without_TD, (x_TD, weight_TK, *experts.parameters()), cotangent_TD[MASK_T], allow_unused=True
    )
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert_close(our_gradient, their_gradient)


def test_an_expert_without_tokens_has_a_gradient_of_zeros_and_not_none(kind):
    experts = some_experts(kind)
    x_TD, _ = inputs()
    y_TD = experts(x_TD, a_routing(torch.full((6, 1), 2), torch.ones(6, 1)))
    y_TD.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    alone = experts(x_TD, a_routing(torch.full((6, 1), 2), torch.ones(6, 1)))
    assert_close(alone, one_by_one(experts, x_TD, torch.full((6, 1), 2), torch.ones(6, 1).double()))


def test_no_token_keeps_the_path_of_the_gradient(kind):
    experts = some_experts(kind)
    x_TD = torch.empty(0, WIDTH, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.empty(0, 2, dtype=torch.float64, requires_grad=True)
    y_TD = experts(x_TD, a_routing(torch.empty(0, 2, dtype=torch.int64), weight_TK))
    assert y_TD.shape == (0, WIDTH)
    y_TD.sum().backward()
    for tensor in (x_TD, weight_TK, *experts.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_the_order_of_a_tokens_pairs_makes_no_difference(kind):
    experts = some_experts(kind)
    x_TD, weight_TK = inputs()
    ours = experts(x_TD, a_routing(EXPERT_TK, weight_TK))
    theirs = experts(x_TD, a_routing(EXPERT_TK.flip(1), weight_TK.flip(1)))
    assert_close(ours, theirs)


def test_input_of_any_layout_is_read_alike(kind):
    experts = some_experts(kind)
    x_TD, weight_TK = inputs()
    routing = a_routing(EXPERT_TK, weight_TK)
    strided_TD = torch.zeros(6, 2 * WIDTH, dtype=torch.float64)[:, ::2].copy_(x_TD)
    assert not strided_TD.is_contiguous()
    assert_close(experts(strided_TD, routing), experts(x_TD, routing))


def test_multiply_adds_count_each_weight_matrix_of_one_expert_once(kind):
    experts = some_experts(kind)
    assert experts.num_experts == NUM_EXPERTS
    assert 0 < experts.ops_per_pair() <= sum(p.numel() for p in experts.parameters()) // NUM_EXPERTS


def test_a_part_is_some_of_the_experts_with_weights_of_its_own(kind):
    """What the whole gives for pairs of these experts alone."""
    experts = some_experts(kind)
    part = experts.part(1, 3)
    assert part.num_experts == 2
    x_TD, weight_TK = inputs()
    expert_TK = torch.tensor([[0, 1]] * 6)
    ours = part(x_TD, a_routing(expert_TK, weight_TK, num_experts=2))
    assert_close(ours, experts(x_TD, a_routing(expert_TK + 1, weight_TK)))
    for parameter in part.parameters():
        torch.nn.init.zeros_(parameter)
    assert all(parameter.any() for parameter in experts.parameters())


def test_a_part_keeps_what_is_frozen(kind):
    experts = some_experts(kind).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in experts.part(0, 2).parameters())
