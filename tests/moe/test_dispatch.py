"""Rows in expert order, and back: a permutation, its copies and its sums."""

import numpy as np
import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from sparsegate.moe import dispatch as dispatching
from sparsegate.moe.dispatch import combine, dispatch, plan_rows
from sparsegate.moe.routing import Routing, sums_of_logits
from tests.helpers.derivatives import assert_derivatives, off_by_a_factor
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, a_routing, dense
from tests.helpers.tolerances import assert_close

MASK_T = torch.tensor([True, False, True, True, False, True])


def some_routing(*, mask_T=MASK_T, dtype=torch.float64):
    """Six tokens, two experts each; expert 3 receives nothing."""
    expert_TK = torch.tensor([[4, 0], [1, 2], [0, 1], [2, 4], [0, 1], [4, 1]])
    weight_TK = torch.rand(6, 2, dtype=dtype).requires_grad_()
    return a_routing(expert_TK, weight_TK, mask_T=mask_T)


def test_the_plan_sorts_the_pairs_by_expert_and_keeps_the_tokens_order():
    routing = some_routing()
    plan = plan_rows(routing)
    expert_N = routing.expert_N.numpy()
    order_N = np.argsort(expert_N, kind="stable")
    assert plan.order_N.tolist() == order_N.tolist()
    assert plan.order_N[plan.row_N].tolist() == list(range(12))
    assert plan.token_N.tolist() == (order_N // 2).tolist()
    assert plan.end_E.tolist() == [int((expert_N <= e).sum()) for e in range(NUM_EXPERTS)]
    assert plan.end_E.dtype == torch.int64


def test_dispatch_copies_each_token_to_its_rows():
    plan = plan_rows(some_routing())
    x_TD = torch.randn(6, WIDTH)
    for row, token in zip(dispatch(x_TD, plan), plan.token_N.tolist(), strict=True):
        assert torch.equal(row, x_TD[token])


def test_combine_sums_each_tokens_weighted_rows():
    routing = some_routing()
    plan = plan_rows(routing)
    rows_ND = torch.randn(12, WIDTH, dtype=torch.float64)
    expected_TD = torch.zeros(6, WIDTH, dtype=torch.float64)
    for row, pair in enumerate(plan.order_N.tolist()):
        expected_TD[routing.token_N[pair]] += routing.weight_N[pair] * rows_ND[row]
    assert_close(combine(rows_ND, plan, routing.weight_N), expected_TD)


def test_combine_adds_in_the_precision_of_the_weights():
    """A thousand experts of one token, each worth an eighth of bfloat16's step at 1: none is lost."""
    expert_TK, weight_TK = torch.arange(1001)[None], torch.full((1, 1001), 2.0**-10)
    routing = a_routing(expert_TK, weight_TK, num_experts=1001)
    rows_ND = torch.ones(1001, 1, dtype=torch.bfloat16)
    assert combine(rows_ND, plan_rows(routing), routing.weight_N).item() == 1001 * 2.0**-10


def test_derivatives_are_those_of_finite_differences():
    routing = some_routing()
    plan = plan_rows(routing)
    rows_ND = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    x_TD = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert_derivatives(lambda x: dispatch(x, plan), x_TD)
    assert_derivatives(lambda rows, weight: combine(rows, plan, weight), rows_ND, routing.weight_N)


def a_varying_routing():
    """Four tokens with three, no, one and two pairs, of which the last one is unused."""
    chosen_TE = torch.zeros(4, NUM_EXPERTS, dtype=torch.bool)
    chosen_TE[0, [0, 3, 4]] = chosen_TE[2, 3] = chosen_TE[3, 1] = True
    weight_TE = torch.rand(4, NUM_EXPERTS, dtype=torch.float64).requires_grad_()
    return Routing.of_batch_choice(
        logit_sums=sums_of_logits(torch.zeros(4, NUM_EXPERTS, dtype=torch.float64), None),
        chosen_TE=chosen_TE,
        weight_TE=weight_TE,
        num_pairs=6,
        mask_T=None,
        threshold=torch.zeros(()),
    )


def test_tokens_may_have_different_numbers_of_pairs():
    routing = a_varying_routing()
    assert routing.token_N.tolist() == [0, 0, 0, 2, 3, 3]
    assert routing.expert_N.tolist() == [0, 3, 4, 3, 1, NUM_EXPERTS]
    assert routing.pairs_T.tolist() == [3, 0, 1, 2]
    assert routing.sums.num_unrouted == 1
    plan, rows_ND = plan_rows(routing), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    expected_TD = torch.zeros(4, 3, dtype=torch.float64)
    for row, pair in enumerate(plan.order_N.tolist()):
        expected_TD[routing.token_N[pair]] += routing.weight_N[pair].detach() * rows_ND[row].detach()
    assert_close(combine(rows_ND, plan, routing.weight_N), expected_TD)
    x_TD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight_N = routing.weight_N.detach().requires_grad_()
    for function, inputs in (
        (lambda x: dispatch(x, plan), (x_TD,)),
        (lambda rows, weight: combine(rows, plan, weight), (rows_ND, weight_N)),
    ):
        torch.autograd.gradcheck(function, inputs)
        torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pairs_of_varying_number_are_added_in_the_precision_of_the_weights(dtype):
    routing = a_varying_routing()
    rows_ND = torch.ones(6, 2, dtype=dtype)
    y_TD = combine(rows_ND, plan_rows(routing), routing.weight_N)
    assert y_TD.dtype == torch.float64
    assert_close(y_TD[:, 0], dense(routing).sum(dim=1))


@pytest.mark.parametrize("function", ["_Gather", "_Sum", "_Permute"])
def test_a_factor_planted_in_a_backward_is_caught(function, monkeypatch):
    cls = getattr(dispatching, function)
    monkeypatch.setattr(cls, "backward", staticmethod(off_by_a_factor(cls.backward, 0)))
    with pytest.raises(GradcheckError):
        test_derivatives_are_those_of_finite_differences()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch itself
def test_forward_mode_is_refused_and_not_silently_zero():
    plan = plan_rows(some_routing())
    x_TD = torch.randn(6, WIDTH)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: dispatch(x, plan), (x_TD,), (x_TD,))


def test_dispatch_and_combine_are_each_others_transpose():
    routing = some_routing(mask_T=None)
    plan = plan_rows(routing)
    x_TD, rows_ND = torch.randn(6, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    ones_N = torch.ones(12, dtype=torch.float64)
    assert_close((dispatch(x_TD, plan) * rows_ND).sum(), (x_TD * combine(rows_ND, plan, ones_N)).sum())


def test_no_token_makes_no_rows():
    routing = a_routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    plan = plan_rows(routing)
    assert plan.end_E.tolist() == [0] * NUM_EXPERTS
    assert dispatch(torch.empty(0, WIDTH), plan).shape == (0, WIDTH)
    assert combine(torch.empty(0, WIDTH), plan, routing.weight_N).shape == (0, WIDTH)


def test_combine_keeps_its_precision_under_autocast():
    routing = some_routing(dtype=torch.float32)
    plan, rows_ND = plan_rows(routing), torch.randn(12, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast_TD = combine(rows_ND, plan, routing.weight_N)
        from_bfloat16_TD = combine(rows_ND.bfloat16(), plan, routing.weight_N)
    assert_close(under_autocast_TD, combine(rows_ND, plan, routing.weight_N))
    assert_close(from_bfloat16_TD, combine(rows_ND.bfloat16().float(), plan, routing.weight_N))
    assert under_autocast_TD.dtype == from_bfloat16_TD.dtype == torch.float32
