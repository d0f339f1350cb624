"""The contract of every kernel that computes stacked experts: values and gradients of the plain twin."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from sparsegate.moe.dispatch import plan_rows
from sparsegate.moe.kernels import groups, products, reference, row_by_row, threaded, unfused
from sparsegate.moe.kernels.activations import ACTIVATIONS
from sparsegate.moe.kernels.grouped import grouped_product
from sparsegate.moe.kernels.grouped_mm import grouped_mm_product
from sparsegate.moe.routing import Routing
from tests.helpers.derivatives import assert_derivatives, off_by_a_factor
from tests.helpers.moe_cases import a_gate, a_routing
from tests.helpers.tolerances import TOLERANCES, assert_close

KERNELS = {
    "threaded": threaded.feed_forward,
    "expert by expert": threaded.feed_forward,
    "several experts at once": threaded.feed_forward,
    "grouped_mm": partial(unfused.feed_forward, product=grouped_mm_product),
    "loop": partial(unfused.feed_forward, product=grouped_product),
}
# What the threaded kernel does with other sizes than those that are small enough for tests.
NOT_ROW_BY_ROW = (row_by_row, "suits", lambda *_: False)
SETTINGS = {
    "expert by expert": [NOT_ROW_BY_ROW, (products, "_FEWEST_NUMBERS", 0)],
    "several experts at once": [NOT_ROW_BY_ROW, (groups, "_FEWEST_GROUPS_PER_THREAD", 1)],
}
PLAIN = partial(unfused.feed_forward, product=reference.grouped_product, recompute=False)
# F.grouped_mm multiplies no float64 and wants rows of 16 bytes.
DTYPES = {
    name: [dtype for dtype in TOLERANCES if name != "grouped_mm" or dtype.itemsize < 8] for name in KERNELS
}
WIDTH, HIDDEN, NUM_EXPERTS = 8, 16, 5


@pytest.fixture(autouse=True)
def setting(request, monkeypatch):
    """Of the kernel that a test is given."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    for module, attribute, value in SETTINGS.get(params.get("name"), []):
        monkeypatch.setattr(module, attribute, value)


@pytest.fixture(autouse=True)
def two_threads():
    """More than one, so that experts are computed side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def routed(name: str) -> Routing:
    """Routings with what can go wrong in them."""
    if name == "ragged":  # as many pairs as experts that chose the token, and unused ones
        return a_gate("expert_choice")(torch.randn(9, 5), torch.rand(9) < 0.8)
    num_tokens = {"no token": 0, "many": 700}.get(name, 7)
    mask_T = torch.rand(num_tokens) < 0.6 if name == "padded" else None
    expert_TK = torch.rand(num_tokens, NUM_EXPERTS).topk(2).indices
    if name == "skewed":  # one expert gets nearly all, two nothing
        expert_TK = torch.tensor([[1, 2], [1, 2], [1, 4], [1, 2], [2, 1], [1, 2], [1, 2]])
    return a_routing(expert_TK, torch.rand(num_tokens, 2), num_experts=NUM_EXPERTS, mask_T=mask_T)


def operands(routing: Routing, activation: str, dtype: torch.dtype) -> list[Tensor]:
    num_inputs = ACTIVATIONS[activation].inputs * HIDDEN
    weight_dtype = torch.promote_types(dtype, torch.float32)
    made = [
        torch.randn(len(routing.pairs_T), WIDTH),
        torch.randn(routing.num_experts, WIDTH, num_inputs) / WIDTH**0.5,
        torch.randn(routing.num_experts, HIDDEN, WIDTH) / HIDDEN**0.5,
    ]
    return [
        *(tensor.to(dtype).requires_grad_() for tensor in made),
        routing.weight_N.detach().to(weight_dtype).requires_grad_(),
    ]


def values_and_gradients(kernel, inputs, routing, cotangent_TD, **options) -> list[Tensor]:
    y_TD = kernel(*inputs, plan_rows(routing), **options)
    return [y_TD, *torch.autograd.grad(y_TD, inputs, cotangent_TD.to(y_TD.dtype))]


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in KERNELS for dtype in DTYPES[name]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["even", "skewed", "padded", "ragged", "no token", "many"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_values_and_gradients_are_those_of_the_plain_twin(name, dtype, activation, case, recompute):
    routing = routed(case)
    inputs = operands(routing, activation, dtype)
    cotangent_TD = torch.randn(inputs[0].shape)
    ours = values_and_gradients(
        KERNELS[name], inputs, routing, cotangent_TD, activation=activation, recompute=recompute
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    theirs = values_and_gradients(PLAIN, exact, routing, cotangent_TD, activation=activation)
    for our_value, their_value, tensor in zip(ours, theirs, [inputs[0], *inputs], strict=True):
        assert our_value.dtype == tensor.dtype
        # Gradients of weights are sums over as many rows as an expert has.
        assert_close(our_value, their_value, dtype=dtype, scale=30 if case == "many" else 4)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_in_unused_tokens_reaches_nothing(name, activation):
    routing = routed("padded")
    used_T = torch.zeros(7, dtype=torch.bool).index_fill(
        0, routing.token_N[routing.expert_N < NUM_EXPERTS], True
    )
    inputs = operands(routing, activation, torch.float32)
    clean_TD, cotangent_TD = inputs[0].detach(), torch.randn(7, WIDTH)
    expected = values_and_gradients(
        KERNELS[name], inputs, routing, cotangent_TD, activation=activation, recompute=False
    )
    inputs[0] = clean_TD.masked_fill(~used_T[:, None], torch.nan).requires_grad_()
    ours = values_and_gradients(
        KERNELS[name],
        inputs,
        routing,
        cotangent_TD.masked_fill(~used_T[:, None], torch.nan),
        activation=activation,
        recompute=False,
    )
    # A gate masks its weights of unused pairs, and with them whatever their gradients are.
    is_used_N = routing.expert_N < NUM_EXPERTS
    for values in (ours, expected):
        values[-1] = values[-1][is_used_N]
    for our_value, value in zip(ours, expected, strict=True):
        assert torch.equal(our_value, value)


# Three experts of width 2 for four tokens; the last expert receives nothing, the second token is padding.
FEW = a_routing(
    torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]]),
    torch.rand(4, 2),
    num_experts=3,
    mask_T=torch.tensor([True, False, True, True]),
)


def few_operands(activation: str) -> list[Tensor]:
    shapes = (4, 2), (3, 2, 2 * ACTIVATIONS[activation].inputs), (3, 2, 2), (8,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", ["threaded", "several experts at once", "loop"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_are_those_of_finite_differences(name, activation):
    torch.set_num_threads(1)
    kernel = partial(KERNELS[name], plan=plan_rows(FEW), activation=activation, recompute=False)
    assert_derivatives(lambda *inputs: kernel(*inputs), *few_operands(activation))


@pytest.mark.parametrize("position", range(4))
def test_a_factor_planted_in_the_backward_is_caught(position, monkeypatch):
    forward = threaded._forward
    monkeypatch.setattr(forward, "_backward_fn", off_by_a_factor(forward._backward_fn, position))
    kernel = partial(KERNELS["threaded"], plan=plan_rows(FEW), activation="relu", recompute=False)
    with pytest.raises(GradcheckError):
        assert_derivatives(lambda *inputs: kernel(*inputs), *few_operands("relu"))


@pytest.mark.parametrize("frozen", range(4))
def test_an_input_that_needs_no_gradient_gets_none_and_changes_no_other(frozen):
    routing = routed("skewed")
    inputs = operands(routing, "relu", torch.float64)
    cotangent_TD = torch.randn(7, WIDTH)
    expected = values_and_gradients(
        KERNELS["threaded"], inputs, routing, cotangent_TD, activation="relu", recompute=False
    )[1:]
    inputs[frozen].requires_grad_(False)
    y_TD = KERNELS["threaded"](*inputs, plan_rows(routing), activation="relu", recompute=False)
    y_TD.backward(cotangent_TD.double())
    for position, (tensor, gradient) in enumerate(zip(inputs, expected, strict=True)):
        if position == frozen:
            assert tensor.grad is None
        else:
            assert_close(tensor.grad, gradient)


def test_one_thread_computes_what_two_do():
    routing = routed("many")
    inputs, cotangent_TD = operands(routing, "relu", torch.float32), torch.randn(700, WIDTH)
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        found.append(
            values_and_gradients(
                KERNELS["threaded"], inputs, routing, cotangent_TD, activation="relu", recompute=False
            )
        )
    for one, two in zip(*found, strict=True):
        assert_close(one, two, scale=30)


def test_a_repeated_step_is_equal_to_the_bit():
    routing = routed("many")
    inputs, cotangent_TD = operands(routing, "relu", torch.float32), torch.randn(700, WIDTH)
    first, *others = [
        values_and_gradients(
            KERNELS["threaded"], inputs, routing, cotangent_TD, activation="relu", recompute=False
        )
        for _ in range(5)
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_memory_layout_makes_no_difference(name):
    routing = routed("even")
    inputs = operands(routing, "relu", torch.float32)
    expected = values_and_gradients(
        KERNELS[name], inputs, routing, torch.ones(7, WIDTH), activation="relu", recompute=False
    )
    strided = [
        torch.zeros(7, 2 * WIDTH)[:, ::2].copy_(inputs[0].detach()).requires_grad_(),
        inputs[1].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        inputs[2].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        inputs[3],
    ]
    ours = values_and_gradients(
        KERNELS[name], strided, routing, torch.ones(1, 1).expand(7, WIDTH), activation="relu", recompute=False
    )
    for our_value, value in zip(ours, expected, strict=True):
        assert_close(our_value, value)


@pytest.mark.parametrize("name", ["threaded", "several experts at once", "loop"])
def test_autocast_computes_as_if_all_but_the_gate_were_cast(name):
    routing = routed("even")
    inputs = operands(routing, "relu", torch.float32)
    cotangent_TD = torch.randn(7, WIDTH).bfloat16().float()
    cast = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:3]]
    options = {"activation": "relu", "recompute": False}
    expected = values_and_gradients(
        KERNELS[name], [*cast, inputs[3]], routing, cotangent_TD.bfloat16(), **options
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = values_and_gradients(KERNELS[name], inputs, routing, cotangent_TD, **options)
    for our_value, value in zip(ours, expected, strict=True):
        assert our_value.dtype == torch.float32
        assert_close(our_value, value, dtype=torch.bfloat16)


@pytest.mark.parametrize("way", ["autocast", "weights in bfloat16"])
def test_gradients_that_are_to_be_differentiated_are_computed_in_the_same_dtype(way):
    routing, cotangent_TD = routed("even"), torch.randn(7, WIDTH)
    inputs = operands(routing, "relu", torch.float32)
    options = {"activation": "relu", "recompute": False}
    if way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y_TD = KERNELS["threaded"](*inputs, plan_rows(routing), **options)
    else:
        inputs[1:3] = [weight.detach().bfloat16().requires_grad_() for weight in inputs[1:3]]
        y_TD = KERNELS["threaded"](*inputs, plan_rows(routing), **options, dtype=torch.float32)
    plain, differentiable = (
        torch.autograd.grad(y_TD, inputs, cotangent_TD, retain_graph=True, create_graph=again)
        for again in (False, True)
    )
    for ours, theirs in zip(differentiable, plain, strict=True):
        assert ours.requires_grad
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, dtype=torch.bfloat16 if way == "autocast" else ours.dtype)


@pytest.mark.parametrize("case", ["padded", "ragged", "no token"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keep", [True, False])
def test_the_threaded_operators_keep_what_they_register(case, activation, keep):
    tensors, pairs_per_token = operator_tensors(routed(case), activation)
    torch.library.opcheck(threaded._forward, (*tensors, pairs_per_token, activation, torch.float32, keep))
    torch.library.opcheck(threaded._backward, backward_arguments(case, activation, keep, True, True))


@pytest.mark.parametrize(("needs_x", "needs_weights"), [(True, False), (False, True), (False, False)])
def test_the_backward_operator_keeps_what_it_registers_where_less_is_wanted(needs_x, needs_weights):
    torch.library.opcheck(
        threaded._backward, backward_arguments("padded", "swiglu", True, needs_x, needs_weights)
    )


def operator_tensors(routing: Routing, activation: str) -> tuple[list[Tensor], int | None]:
    plan = plan_rows(routing)
    of_plan = [plan.order_N, plan.row_N, plan.token_N, plan.end_E, plan.pairs_T]
    return [*operands(routing, activation, torch.float32), *of_plan], plan.pairs_per_token


def backward_arguments(case: str, activation: str, keep: bool, *needs: bool) -> tuple[Any, ...]:
    tensors, pairs_per_token = operator_tensors(routed(case), activation)
    x_TD, w_in_EDS, *_, token_N, _, _ = detached = [tensor.detach() for tensor in tensors]
    kept_NS = torch.randn(len(token_N) if keep else 0, w_in_EDS.shape[2])
    rest = (pairs_per_token, activation, torch.float32, *needs)
    return torch.randn(x_TD.shape), *detached, kept_NS, *rest


def test_dtypes_that_differ_are_refused_with_their_names():
    routing = routed("even")
    inputs = operands(routing, "relu", torch.float32)
    inputs[0] = inputs[0].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"x \(torch.bfloat16\).*torch.float32.*autocast"):
        KERNELS["threaded"](*inputs, plan_rows(routing), activation="relu", recompute=False)
