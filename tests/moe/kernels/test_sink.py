"""A sink gets what `.grad` would have held, expert by expert, and may use it up in the backward pass."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sparsegate.moe.dispatch import plan_rows
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.swiglu import SwiGLU
from sparsegate.moe.kernels import threaded
from sparsegate.moe.kernels.activations import ACTIVATIONS
from sparsegate.optim.factored import FactoredAdam
from tests.helpers.moe_cases import a_routing
from tests.helpers.tolerances import assert_close
from tests.moe.kernels.test_feed_forward import (
    FEW,
    NUM_EXPERTS,
    WIDTH,
    few_operands,
    operands,
    routed,
    setting,  # noqa: F401
    two_threads,  # noqa: F401
)

LR = 0.1
# Kernels, and their `setting` in the tests of kernels.
NAMES = [("threaded", "threaded"), ("threaded", "several experts at once"), ("loop", "loop")]
KINDS = {"relu": FeedForward, "swiglu": SwiGLU}


class SGD:
    """Descends at once, in whatever thread."""

    def consume(self, weight_EDH: Tensor, first_expert: int, grad_EDH: Tensor) -> None:
        end = first_expert + len(grad_EDH)
        with torch.no_grad():
            weight_EDH[first_expert:end] -= LR * grad_EDH.to(weight_EDH.dtype)
        grad_EDH.fill_(torch.nan)  # it may be overwritten


class Recording:
    """Keeps the gradients of each weight, by its address, zeros where none came."""

    def __init__(self, *weights: Tensor) -> None:
        self.grads = {weight.data_ptr(): torch.zeros_like(weight) for weight in weights}
        self.calls: list[tuple[int, int]] = []

    def consume(self, weight_EDH: Tensor, first_expert: int, grad_EDH: Tensor) -> None:
        grads = self.grads[weight_EDH.data_ptr()]
        grads[first_expert : first_expert + len(grad_EDH)] = grad_EDH
        self.calls.append((weight_EDH.data_ptr(), first_expert))


def experts_of(activation: str, **options: Any) -> FeedForward | SwiGLU:
    torch.manual_seed(1)
    return KINDS[activation](**{"width": WIDTH, "hidden": 16, "num_experts": NUM_EXPERTS, **options})


@pytest.mark.parametrize(("kernel", "name"), NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["even", "skewed", "padded", "ragged", "no token", "many"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_descending_in_backward_is_backward_and_then_a_step(kernel, name, activation, case, recompute):
    routing = routed(case)
    options = {"dtype": torch.float64, "recompute": recompute, "num_experts": routing.num_experts}
    ours, theirs = experts_of(activation, kernel=kernel, **options), experts_of(activation, **options)
    ours.sink = SGD()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=LR)
    for _ in range(3):
        x_TD = torch.randn(len(routing.pairs_T), WIDTH, dtype=torch.float64)
        cotangent_TD = torch.randn(x_TD.shape, dtype=torch.float64)
        found = []
        for experts in (ours, theirs):
            leaf_TD, leaf_N = x_TD.clone().requires_grad_(), routing.weight_N.detach().requires_grad_()
            y_TD = experts(leaf_TD, replace(routing, weight_N=leaf_N))
            y_TD.backward(cotangent_TD)
            found.append((y_TD, leaf_TD.grad, leaf_N.grad))
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in ours.parameters())
        for our_value, their_value in zip(*found, strict=True):
            assert_close(our_value, their_value, scale=30)
        for our_weight, their_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(our_weight, their_weight, scale=30)


class _ThroughSink(torch.autograd.Function):
    """The threaded kernel with a sink, as a function whose gradient is what the sink got."""

    @staticmethod
    def forward(ctx: Any, activation: str, *inputs: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(*inputs)
        return _apply(inputs, activation, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        sink = Recording(*inputs[1:3])
        with torch.enable_grad():
            _apply(inputs, ctx.activation, sink).backward(*grads)
        assert sorted(expert for _, expert in sink.calls) == [0, 0, 1, 1]
        return None, inputs[0].grad, *sink.grads.values(), inputs[3].grad


def _apply(inputs, activation, sink):
    kernel = partial(threaded.feed_forward, plan=plan_rows(FEW), activation=activation, recompute=False)
    return kernel(*inputs, sink=sink)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_a_sink_gets_are_the_derivatives_of_finite_differences(activation):
    function = partial(_ThroughSink.apply, activation)
    gradcheck(function, few_operands(activation), atol=1e-6, rtol=1e-6)


def test_second_derivatives_are_refused():
    x_TD, w_in, w_out, weight_N = operands(routed("even"), "relu", torch.float64)
    y_TD = threaded.feed_forward(
        x_TD,
        w_in,
        w_out,
        weight_N,
        plan_rows(routed("even")),
        activation="relu",
        recompute=False,
        sink=Recording(w_in, w_out),
    )
    with pytest.raises(RuntimeError, match="first derivatives alone; set their sink to None"):
        torch.autograd.grad(y_TD.sum(), x_TD, create_graph=True)


@pytest.mark.parametrize("frozen", ["w_in", "w_out"])
def test_a_frozen_weight_is_not_given_away(frozen):
    experts = experts_of("relu")
    getattr(experts, frozen).requires_grad_(False)
    experts.sink = sink = Recording(experts.w_in, experts.w_out)
    experts(torch.randn(7, WIDTH), routed("even")).sum().backward()
    assert {address for address, _ in sink.calls} == {
        weight.data_ptr() for weight in experts.parameters() if weight.requires_grad
    }


@pytest.mark.parametrize("kernel", ["threaded", "loop"])
@pytest.mark.parametrize("way", ["checkpointed", "offloaded"])
def test_a_sink_gets_the_parameters_whatever_becomes_of_saved_tensors(kernel, way):
    experts, given = experts_of("relu", kernel=kernel), set()
    experts.sink = SimpleNamespace(consume=lambda weight_EDH, first_expert, grad_EDH: given.add(weight_EDH))
    x_TD, routing = torch.randn(7, WIDTH, requires_grad=True), routed("even")
    if way == "checkpointed":
        y_TD = checkpoint(experts, x_TD, routing, use_reentrant=False)
    else:
        with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy):
            y_TD = experts(x_TD, routing)
    y_TD.sum().backward()
    assert given == set(experts.parameters())


def test_without_gradients_wanted_nothing_is_given_away():
    experts = experts_of("relu")
    experts.sink = sink = Recording(*experts.parameters())
    with torch.no_grad():
        experts(torch.randn(7, WIDTH), routed("even"))
    assert not sink.calls


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_of_a_gradient_that_is_not_finite_nothing_is_given_away_and_the_input_hears_of_it(wrong):
    experts = experts_of("relu")
    experts.sink = sink = Recording(*experts.parameters())
    x_TD, cotangent_TD = torch.randn(7, WIDTH, requires_grad=True), torch.randn(7, WIDTH)
    cotangent_TD[3, 2] = wrong
    experts(x_TD, routed("even")).backward(cotangent_TD)
    assert not sink.calls
    assert not x_TD.grad.isfinite().all()


def test_padding_may_hold_what_it_will():
    experts = experts_of("relu")
    experts.sink = sink = Recording(*experts.parameters())
    mask_T = torch.tensor([True, False, True])
    routing = a_routing(
        torch.tensor([[0, 1], [2, 3], [1, 4]]), torch.rand(3, 2), num_experts=5, mask_T=mask_T
    )
    cotangent_TD = torch.randn(3, WIDTH).masked_fill(~mask_T[:, None], torch.nan)
    experts(torch.randn(3, WIDTH), routing).backward(cotangent_TD)
    assert {expert for _, expert in sink.calls} == {0, 1, 4}
    assert all(grad.isfinite().all() for grad in sink.grads.values())


def test_a_layer_that_is_used_twice_cannot_change_between_its_backward_passes():
    experts = experts_of("relu")
    experts.sink = SGD()
    x_TD = torch.randn(7, WIDTH, requires_grad=True)
    y_TD = experts(experts(x_TD, routed("even")), routed("even"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y_TD.sum().backward()


@pytest.mark.parametrize(("kernel", "name"), NAMES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_weights_kept_in_bfloat16_compute_as_if_they_were_cast(kernel, name, recompute):
    ours = experts_of("relu", kernel=kernel, storage=torch.bfloat16, recompute=recompute)
    theirs = experts_of("relu")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    theirs.load_state_dict({name: value.float() for name, value in ours.state_dict().items()})
    sink = Recording(*(p.float() for p in ours.parameters()))
    sink.grads = dict(zip((p.data_ptr() for p in ours.parameters()), sink.grads.values(), strict=True))
    ours.sink = sink
    x_TD, cotangent_TD, routing = torch.randn(7, WIDTH), torch.randn(7, WIDTH), routed("even")
    found = []
    for experts in (ours, theirs):
        leaf_TD = x_TD.clone().requires_grad_()
        y_TD = experts(leaf_TD, routing)
        y_TD.backward(cotangent_TD)
        found.append((y_TD, leaf_TD.grad))
    for our_value, their_value in zip(*found, strict=True):
        assert our_value.dtype == torch.float32
        assert_close(our_value, their_value)
    dtype = torch.float32 if kernel == "threaded" else torch.bfloat16  # the loop's casts round gradients
    for our_grad, parameter in zip(sink.grads.values(), theirs.parameters(), strict=True):
        assert_close(our_grad, parameter.grad, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_part_of_experts_kept_in_bfloat16_casts_them_as_well(activation):
    whole = experts_of(activation, storage=torch.bfloat16)
    x_TD, expert_TK, weight_TK = torch.randn(4, WIDTH), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
    ours = whole.part(1, 3)(x_TD, a_routing(expert_TK, weight_TK, num_experts=2))
    assert ours.dtype == torch.float32
    assert_close(ours, whole(x_TD, a_routing(expert_TK + 1, weight_TK, num_experts=NUM_EXPERTS)))


def test_weights_drawn_in_bfloat16_are_the_normal_numbers_that_float32_has():
    narrow = FeedForward(width=64, hidden=128, num_experts=3, storage=torch.bfloat16).w_in.detach().float()
    std = (2 / 64) ** 0.5
    assert narrow.std().item() == pytest.approx(std, rel=0.02)
    assert narrow.mean().abs() < 0.02 * std
    assert 3.5 * std < narrow.abs().max() < 6 * std
    assert len(narrow.unique()) > 1000  # of 16 bits, not the few that were drawn with eight


def test_factored_adam_in_backward_is_backward_and_then_its_step():
    ours, theirs = experts_of("relu"), experts_of("relu")
    ours.sink = sunk = FactoredAdam(ours.parameters(), lr=0.01, beta2=0.9)
    plain = FactoredAdam(theirs.parameters(), lr=0.01, beta2=0.9)
    for _ in range(4):
        expert_TK = torch.rand(7, NUM_EXPERTS).topk(2).indices % 4  # the last expert is never used
        routing = a_routing(expert_TK, torch.rand(7, 2), num_experts=NUM_EXPERTS)
        x_TD, cotangent_TD = torch.randn(7, WIDTH), torch.randn(7, WIDTH)
        for experts, optimizer in ((ours, sunk), (theirs, plain)):
            experts(x_TD, routing).backward(cotangent_TD)
            optimizer.step()
            optimizer.zero_grad()
    for our_weight, their_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(our_weight, their_weight, scale=10)
