"""Laws of the layer over layers and batches of all small sizes, chosen by Hypothesis."""

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss, squared_cv
from tests.helpers.moe_cases import a_moe, gradients
from tests.helpers.tolerances import assert_close


class Case(NamedTuple):
    """A layer, in training or evaluation, and a batch for it."""

    moe: MoE
    x_TD: Tensor
    noise_TE: Tensor
    seed: int


@st.composite
def cases(draw, *, all_experts=False):
    num_experts = draw(st.integers(1, 9))
    k = num_experts if all_experts else draw(st.integers(1, num_experts))
    width, hidden, num_tokens = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 20))
    seed = draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    moe = a_moe(width=width, hidden=hidden, num_experts=num_experts, k=k)
    x_TD = draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(num_tokens, width, dtype=torch.float64)
    noise_TE = torch.randn(num_tokens, num_experts, dtype=torch.float64)
    return Case(moe.train(draw(st.booleans())), x_TD, noise_TE, seed)


def scale_of(y: Tensor) -> float:
    return max([1.0, *y.detach().abs().flatten().tolist()])


@given(cases())
def test_permuting_tokens_permutes_outputs(case):
    order_T = torch.randperm(len(case.x_TD))
    y_TD, routing = case.moe(case.x_TD, None, case.noise_TE)
    permuted_TD, permuted = case.moe(case.x_TD[order_T], None, case.noise_TE[order_T])
    assert_close(permuted_TD, y_TD[order_T], scale=scale_of(y_TD))
    assert_close(permuted.sums.importance_E, routing.sums.importance_E)
    assert_close(permuted.sums.load_E, routing.sums.load_E)


@given(cases())
def test_permuting_experts_with_their_gate_columns_leaves_outputs_equal(case):
    gate, experts = case.moe.gate, case.moe.experts
    order_E = torch.randperm(gate.num_experts)
    y_TD, routing = case.moe(case.x_TD, None, case.noise_TE)
    with torch.no_grad():
        for weight in (gate.w_gate, gate.w_noise):
            weight.copy_(weight[:, order_E])
        for weight in (experts.w_in, experts.w_out):
            weight.copy_(weight[order_E])
    permuted_TD, permuted = case.moe(case.x_TD, None, case.noise_TE[:, order_E])
    assert_close(permuted_TD, y_TD, scale=scale_of(y_TD))
    assert_close(permuted.sums.load_E, routing.sums.load_E[order_E])
    assert_close(importance_loss(permuted), importance_loss(routing))


@given(cases())
def test_gates_are_not_negative_sum_to_one_and_are_exactly_k(case):
    _, routing = case.moe(case.x_TD, None, case.noise_TE)
    k = case.moe.gate.pairs_per_token
    weight_TK, expert_TK = routing.weight_N.reshape(-1, k), routing.expert_N.reshape(-1, k)
    assert (weight_TK >= 0).all()
    assert_close(weight_TK.sum(dim=1), torch.ones(len(case.x_TD)))
    assert all(len(set(row)) == k for row in expert_TK.tolist())
    assert routing.sums.count_E.sum() == k * len(case.x_TD)
    assert_close(routing.sums.importance_E.sum(), torch.tensor(float(len(case.x_TD))))


@given(cases(all_experts=True))
def test_where_all_experts_are_chosen_the_mixture_is_dense(case):
    gate, experts = case.moe.gate, case.moe.experts
    logits_TE = case.x_TD @ gate.w_gate
    if case.moe.training:
        logits_TE = logits_TE + case.noise_TE * torch.nn.functional.softplus(case.x_TD @ gate.w_noise)
    y_ETD = (case.x_TD @ experts.w_in).relu() @ experts.w_out
    expected_TD = torch.einsum("te,etd->td", logits_TE.softmax(dim=1), y_ETD)
    y_TD, _ = case.moe(case.x_TD, None, case.noise_TE)
    assert_close(y_TD, expected_TD, scale=scale_of(y_TD))


@given(cases())
def test_an_expert_that_is_not_chosen_has_no_gradient(case):
    y_TD, routing = case.moe(case.x_TD, None, case.noise_TE)
    idle_E = routing.sums.count_E == 0
    for gradient in gradients(y_TD.square().sum(), case.moe.experts.w_in, case.moe.experts.w_out):
        assert not gradient[idle_E].any()


@given(cases(), st.integers(1, 4))
def test_batch_and_time_are_one_list_of_tokens(case, num_steps):
    num_rows = len(case.x_TD) // num_steps
    x_BSD, noise_BSE = (
        value[: num_rows * num_steps].unflatten(0, (num_rows, num_steps))
        for value in (case.x_TD, case.noise_TE)
    )
    y_BSD, routing = case.moe(x_BSD, None, noise_BSE)
    steps = [case.moe(x_BSD[:, s], None, noise_BSE[:, s]) for s in range(num_steps)]
    assert_close(y_BSD, torch.stack([y for y, _ in steps], dim=1), scale=scale_of(case.x_TD) ** 2)
    for field in ("importance_E", "load_E", "count_E", "num_tokens"):
        total = sum(getattr(r.sums, field) for _, r in steps)
        assert_close(getattr(routing.sums, field), total, dtype=torch.float64)


@given(cases(), st.sampled_from([0.0, 7.0, torch.nan, torch.inf]))
def test_padding_leaves_no_trace_in_values_sums_and_gradients(case, padding):
    moe, mask_T = case.moe, torch.rand(len(case.x_TD)) < 0.6
    padded_TD = case.x_TD.masked_fill(~mask_T[:, None], padding).requires_grad_()
    real_TD = case.x_TD[mask_T].requires_grad_()
    y_TD, routing = moe(padded_TD, mask_T, case.noise_TE)
    real_y_TD, real = moe(real_TD, None, case.noise_TE[mask_T])
    assert_close(y_TD[mask_T], real_y_TD, scale=scale_of(y_TD))
    assert not y_TD[~mask_T].any()
    for field in ("importance_E", "load_E", "count_E", "num_tokens"):
        assert_close(getattr(routing.sums, field), getattr(real.sums, field), dtype=torch.float64)

    ours = gradients(y_TD.sum() + load_loss(routing) + importance_loss(routing), padded_TD, *moe.parameters())
    theirs = gradients(real_y_TD.sum() + load_loss(real) + importance_loss(real), real_TD, *moe.parameters())
    assert not ours[0][~mask_T].any()
    for our_gradient, their_gradient in zip((ours[0][mask_T], *ours[1:]), theirs, strict=True):
        assert_close(our_gradient, their_gradient, scale=100 * scale_of(their_gradient))


@given(cases(), st.integers(0, 20))
def test_sums_of_two_parts_are_the_sums_of_the_whole(case, cut):
    _, whole = case.moe(case.x_TD, None, case.noise_TE)
    first, second = (
        case.moe(case.x_TD[part], None, case.noise_TE[part])[1].sums
        for part in (slice(cut), slice(cut, None))
    )
    for field in ("importance_E", "load_E", "count_E", "num_tokens"):
        assert_close(getattr(first + second, field), getattr(whole.sums, field), dtype=torch.float64)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_squared_cv_is_at_least_zero_and_at_most_n_minus_one(values):
    loss = float(squared_cv(torch.tensor(values, dtype=torch.float64)))
    assert 0 <= loss <= (len(values) - 1) * (1 + 1e-9)


@given(st.floats(0, 1e12), st.integers(1, 1000))
def test_squared_cv_of_equal_loads_is_zero(value, num_experts):
    assert squared_cv(torch.full((num_experts,), value, dtype=torch.float64)) < 1e-20
