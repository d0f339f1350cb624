"""Noisy top-k choice on the CPU: values and gradients of the equations as they read."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from sparsegate.moe.kernels import noisy_choice, threaded_choice
from tests.helpers.derivatives import assert_derivatives, off_by_a_factor
from tests.helpers.tolerances import assert_close

NUM_EXPERTS, K = 9, 3
SUITS_MAXIMA = threaded_choice._suits_maxima
# Rows, and the group of each: so many groups, or one that has all rows, or some.
CASES = {
    "one group": (50, None, 1),
    "padded": (50, (torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.3).long(), 1),
    "all padded": (5, torch.ones(5, dtype=torch.int64), 1),
    "groups": (50, torch.arange(50) // 11, 5),
    "a large group among small ones": (50, torch.tensor([0] * 3 + [1] * 40 + [2] * 3 + [4] * 4), 5),
    "groups, unused rows, an empty group": (50, torch.arange(50) // 10 + 1, 5),
    "no row": (0, None, 1),
}


# By which way the best are found: the one or the other whatever the size, or as it suits.
WAYS = {"maxima": lambda value_NB, k: True, "topk": lambda value_NB, k: False}


@pytest.fixture(autouse=True, params=WAYS)
def small_tasks_in_two_threads(request, monkeypatch):
    """Of few rows, so that there are many, of one group and of several; once for each way."""
    monkeypatch.setattr(threaded_choice, "_NUMBERS_PER_TASK", 17 * NUM_EXPERTS)
    monkeypatch.setattr(threaded_choice, "_FEWEST_ROWS_PER_TASK", 1)
    monkeypatch.setattr(threaded_choice, "_suits_maxima", WAYS[request.param])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def logits(num_rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Clean logits and those of the noise, some of it next to nothing; and its draws."""
    logits_NS = torch.randn(num_rows, 2 * NUM_EXPERTS, dtype=dtype)
    logits_NS[1::3, NUM_EXPERTS:] = -40.0
    return [logits_NS.requires_grad_(), torch.randn(num_rows, NUM_EXPERTS, dtype=dtype, requires_grad=True)]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_no_gradient_is_a_denormal_number(num_threads):
    """A product with a few of them, as the gate's gradient is, would take fifty times as long."""
    torch.set_num_threads(num_threads)
    num_rows = 2000
    logits_NS = torch.cat([torch.linspace(0, 15, NUM_EXPERTS).expand(num_rows, -1)] * 2, dim=1) + torch.randn(
        num_rows, 2 * NUM_EXPERTS
    )
    logits_NS[:, NUM_EXPERTS:] = 0.5
    noise_NB, tiny = torch.randn(num_rows, NUM_EXPERTS), torch.finfo(torch.float32).tiny
    num_denormal = {}
    for module in (noisy_choice.equations, threaded_choice.noisy_choice):
        own_NS = logits_NS.clone().requires_grad_()
        choice = module(own_NS, noise_NB, None, num_groups=1, k=K, noise_epsilon=0.0)
        choice.load_AB.square().sum().backward()
        num_denormal[module] = ((own_NS.grad != 0) & (own_NS.grad.abs() < tiny)).sum().item()
    assert num_denormal[threaded_choice.noisy_choice] == 0 < num_denormal[noisy_choice.equations]


def outputs(choice: noisy_choice.Choice) -> list[Tensor]:
    return [choice.weight_NK, choice.load_AB, *choice.logit_sums]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise_epsilon", [0.0, 0.01])
def test_values_and_gradients_are_those_of_the_equations(case, dtype, noise_epsilon):
    num_rows, group_N, num_groups = CASES[case]
    inputs = logits(num_rows, dtype)
    found = [
        choose(*inputs, group_N, num_groups=num_groups, k=K, noise_epsilon=noise_epsilon)
        for choose in (threaded_choice.noisy_choice, noisy_choice.equations)
    ]
    ours, theirs = (outputs(choice) for choice in found)
    used_N = torch.ones(num_rows, dtype=torch.bool) if group_N is None else group_N < num_groups
    assert torch.equal(found[0].expert_NK[used_N], found[1].expert_NK[used_N])
    cotangents = [torch.randn_like(value) for value in theirs]
    # A gate masks the weights of unused rows, and with them their gradients.
    cotangents[0] *= used_N[:, None]
    for our_value, their_value in zip(ours[1:], theirs[1:], strict=True):
        assert_close(our_value, their_value, dtype=dtype)
    assert_close(ours[0][used_N], theirs[0][used_N], dtype=dtype)
    for part in (slice(None), slice(1), slice(1, 2), slice(2, 3), slice(3, 4)):  # together, and each alone
        gradients = [
            torch.autograd.grad(
                values[part], inputs, cotangents[part], retain_graph=True, materialize_grads=True
            )
            for values in (ours, theirs)
        ]
        for our_gradient, their_gradient in zip(*gradients, strict=True):
            assert_close(our_gradient, their_gradient, dtype=dtype, scale=10)


@pytest.mark.parametrize("kind", ["numbers", "ties", "-inf", "inf", "nan", "huge"])
@pytest.mark.parametrize(("num_columns", "k"), [(4, 1), (4, 4), (32, 3), (33, 8), (64, 9), (500, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maxima_are_those_of_topk(kind, num_columns, k, dtype):
    value_NB = torch.randn(20, num_columns, dtype=dtype)
    if kind == "ties":
        value_NB = value_NB.round()
    elif kind == "huge":
        value_NB[:, :3] = torch.finfo(dtype).max
    elif kind != "numbers":
        value_NB[torch.rand(20, num_columns) < 0.9] = float(kind)
    expected_NK, _ = value_NB.topk(k)
    top_NK, index_NK = threaded_choice._maxima(value_NB.clone(), k)
    assert top_NK.dtype == dtype
    assert torch.equal(top_NK.nan_to_num(7.0), expected_NK.nan_to_num(7.0))
    assert torch.equal(value_NB.gather(1, index_NK).nan_to_num(7.0), expected_NK.nan_to_num(7.0))
    assert all(len(set(row)) == k for row in index_NK.tolist())


def test_of_equals_the_first_is_the_first_maximum():
    _, index_NK = threaded_choice._maxima(torch.tensor([[1.0, 2.0, 2.0, 1.0, 0.0]]), 4)
    assert index_NK.tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "k", "dtype", "suits"),
    [
        (256, 64, 4, torch.float32, True),
        (255, 64, 4, torch.float32, False),  # a few numbers, whose calls take longer than a sort
        (1024, 31, 4, torch.float32, False),
        (1024, 255, 4, torch.float64, True),
        (1024, 256, 4, torch.float64, False),  # so many that torch sorts the few best alone
        (1024, 64, 9, torch.float32, False),
        (1024, 64, 4, torch.bfloat16, False),  # which cannot count to 255
    ],
)
def test_maxima_are_taken_where_they_are_faster(num_rows, num_columns, k, dtype, suits):
    assert SUITS_MAXIMA(torch.empty(num_rows, num_columns, dtype=dtype), k) == suits


def test_of_equals_those_that_were_chosen_have_the_gradients_that_are_to_be_differentiated():
    logits_NS = torch.zeros(3, 128, dtype=torch.float64, requires_grad=True)
    noise_NB, cotangent_NK = torch.zeros(3, 64, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    choice = threaded_choice.noisy_choice(logits_NS, noise_NB, None, num_groups=1, k=4, noise_epsilon=0.0)
    plain, differentiable = (
        torch.autograd.grad(
            outputs(choice),
            logits_NS,
            [cotangent_NK, *map(torch.ones_like, outputs(choice)[1:])],
            create_graph=again,
            retain_graph=True,
        )[0]
        for again in (False, True)
    )
    assert_close(differentiable, plain)


@pytest.mark.parametrize("poisoned", [False, True])
def test_where_the_deviation_is_next_to_nothing_the_load_does_not_move_it(poisoned):
    """Beside a threshold that close the quotient of eq. 9 has a gradient, which its clamp ends."""
    clean_NB = (torch.arange(NUM_EXPERTS, dtype=torch.float64) * 1e-13).expand(6, -1)
    logits_NS = torch.cat([clean_NB, torch.full_like(clean_NB, -30.0)], dim=1)
    padding_N = torch.tensor([1, 0, 0, 0, 0, 0])
    if poisoned:
        logits_NS[0, NUM_EXPERTS] = torch.nan
    logits_NS.requires_grad_()
    load_AB = threaded_choice.noisy_choice(
        logits_NS, torch.zeros_like(clean_NB), padding_N, num_groups=1, k=K, noise_epsilon=0.0
    ).load_AB
    (grad_NS,) = torch.autograd.grad(load_AB, logits_NS, torch.linspace(1, 2, NUM_EXPERTS).double()[None])
    assert grad_NS[1:, :NUM_EXPERTS].any()
    assert not grad_NS[1:, NUM_EXPERTS:].any()


def test_no_sum_depends_on_the_number_of_threads():
    inputs = logits(500, torch.float32)
    choose = partial(threaded_choice.noisy_choice, *inputs, None, num_groups=1, k=K, noise_epsilon=0.0)
    several = outputs(choose())
    torch.set_num_threads(1)
    for ours, alone in zip(several, outputs(choose()), strict=True):
        assert torch.equal(ours, alone)


def few_rows(case: str):
    """Three rows, with a sum of each kind."""
    group_N = {"one group": None, "padded": torch.tensor([0, 1, 0]), "groups": torch.tensor([0, 1, 2])}[case]

    def choose(*inputs: Tensor) -> tuple[Tensor, ...]:
        num_groups = 2 if case == "groups" else 1
        return tuple(
            outputs(
                threaded_choice.noisy_choice(*inputs, group_N, num_groups=num_groups, k=2, noise_epsilon=0.01)
            )
        )

    inputs = [torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (8, 4)]
    return choose, inputs


@pytest.mark.parametrize("case", ["one group", "padded", "groups"])
def test_derivatives_are_those_of_finite_differences(case):
    torch.set_num_threads(1)
    choose, inputs = few_rows(case)
    assert_derivatives(choose, *inputs)


@pytest.mark.parametrize("position", range(2))
def test_a_factor_planted_in_the_backward_is_caught(position, monkeypatch):
    forward = threaded_choice._forward
    monkeypatch.setattr(forward, "_backward_fn", off_by_a_factor(forward._backward_fn, position))
    choose, inputs = few_rows("one group")
    with pytest.raises(GradcheckError):
        assert_derivatives(choose, *inputs)


@pytest.mark.parametrize("case", ["one group", "padded", "groups"])
def test_the_operators_are_what_torch_expects_of_operators(case):
    num_rows, group_N, num_groups = CASES[case]
    inputs = logits(num_rows, torch.float32)
    torch.library.opcheck(threaded_choice._forward, (*inputs, group_N, num_groups, K, 0.0))
    weight_NK, *_, expert_NK1 = threaded_choice._forward(*inputs, group_N, num_groups, K, 0.0)
    plain = [tensor.detach() for tensor in inputs]
    grads = (torch.randn(num_rows, K), torch.randn(num_groups, NUM_EXPERTS), None, torch.randn(()))
    for needs_noise in (False, True):
        torch.library.opcheck(
            threaded_choice._backward,
            (*grads, *plain, group_N, expert_NK1, weight_NK.detach(), num_groups, 0.0, needs_noise),
        )
