"""What a sink gets of the Triton kernels, some experts at a time, is what `.grad` would have held."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from sparsegate.moe.dispatch import plan_rows
from sparsegate.moe.kernels.triton import feed_forward as operators
from sparsegate.moe.kernels.triton.feed_forward import feed_forward
from sparsegate.optim.factored import FactoredAdam
from tests.helpers.tolerances import assert_close
from tests.moe.kernels.test_sink import SGD, Recording
from tests.moe.kernels.triton.test_feed_forward import ACTIVATIONS, DEVICE, a_routing, operands

WIDTH, HIDDEN = 21, 19


@pytest.fixture(autouse=True)
def two_experts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_NUMBERS_GIVEN", 2 * WIDTH * HIDDEN * 2 + 5)


def gradients(function, given: list[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given]
    function(leaves).backward(cotangent)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_sink_gets_the_gradients_of_weights_and_the_rest_is_as_without(activation, dtype, recompute):
    """Of seven experts, two of them without rows."""
    chosen = torch.randint(4, (23, 1), device=DEVICE) + torch.arange(2, device=DEVICE)
    routing = a_routing(23, 7, 2, chosen=chosen)
    given, cotangent = operands(routing, activation, dtype=dtype), torch.randn(23, WIDTH, device=DEVICE)
    compute = partial(feed_forward, plan=plan_rows(routing), activation=activation, recompute=recompute)
    grad_x, grad_in, grad_out, grad_weight = gradients(
        lambda leaves: compute(*leaves), given, cotangent.to(dtype)
    )
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    sink = Recording(*leaves[1:3])
    y_TD = compute(*leaves, sink=sink)
    assert torch.equal(y_TD, compute(*given))
    y_TD.backward(cotangent.to(dtype))
    assert torch.equal(leaves[0].grad, grad_x)
    assert torch.equal(leaves[3].grad, grad_weight)
    assert leaves[1].grad is leaves[2].grad is None
    for found, expected in zip(sink.grads.values(), (grad_in, grad_out), strict=True):
        assert torch.equal(found, expected)
    assert not any(grad[5:].any() for grad in sink.grads.values())
    by_weight = [[first for address, first in sink.calls if address == w.data_ptr()] for w in leaves[1:3]]
    together = {"relu": 4, "swiglu": 2}[activation]
    assert by_weight == [list(range(0, 7, together))] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_sink_may_change_weights_at_once(activation):
    """They are not read any more: the gradients of the input are those of the weights as they were."""
    routing = a_routing(23, 5, 2)
    given, cotangent = operands(routing, activation), torch.randn(23, WIDTH, device=DEVICE)
    compute = partial(feed_forward, plan=plan_rows(routing), activation=activation)
    grad_x, grad_in, *_ = gradients(lambda leaves: compute(*leaves), given, cotangent)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    compute(*leaves, sink=SGD()).backward(cotangent)
    assert torch.equal(leaves[0].grad, grad_x)
    assert_close(leaves[1], given[1] - 0.1 * grad_in)


class Copies(TorchDispatchMode):
    """Remembers the shapes of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(found.shape)
        return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_weights_of_16_bits_are_cast_to_float32_and_no_stack_of_them_is_copied(activation, recompute):
    routing = a_routing(23, 5, 2)
    given, cotangent = operands(routing, activation), torch.randn(23, WIDTH, device=DEVICE)
    narrow = [given[0], *(weight.detach().bfloat16().requires_grad_() for weight in given[1:3]), given[3]]
    compute = partial(
        feed_forward,
        plan=plan_rows(routing),
        activation=activation,
        recompute=recompute,
        dtype=torch.float32,
    )
    sink = Recording(*(weight.float() for weight in narrow[1:3]))
    sink.grads = dict(zip((w.data_ptr() for w in narrow[1:3]), sink.grads.values(), strict=True))
    with Copies() as copies:
        y_TD = compute(*narrow, sink=sink)
        y_TD.backward(cotangent)
    assert y_TD.dtype == torch.float32
    assert not any(len(shape) == 3 for shape in copies.shapes)
    cast = [tensor.detach().float().requires_grad_() for tensor in narrow]
    expected = gradients(lambda leaves: compute(*leaves), cast, cotangent)
    assert torch.equal(narrow[0].grad, expected[0])
    for found, grad in zip(sink.grads.values(), expected[1:3], strict=True):
        assert torch.equal(found, grad)
    without = gradients(lambda leaves: compute(*leaves), narrow, cotangent)
    for found, grad in zip(without[1:3], expected[1:3], strict=True):
        assert torch.equal(found, grad.bfloat16())


def test_input_and_weights_of_two_dtypes_are_refused_unless_one_is_named():
    routing = a_routing(9, 5, 2)
    given = operands(routing, "relu")
    narrow = [given[0], given[1].bfloat16(), given[2].bfloat16(), given[3]]
    for sink in (None, Recording(*given[1:3])):
        with pytest.raises(ValueError, match="must have the dtype of the experts' weights"):
            feed_forward(*narrow, plan_rows(routing), "relu", sink=sink)


def test_a_layer_that_is_used_twice_cannot_change_between_its_backward_passes():
    routing = a_routing(23, 5, 2)
    given = operands(routing, "relu")
    compute = partial(feed_forward, plan=plan_rows(routing), activation="relu", sink=SGD())
    y_TD = compute(compute(*given), *given[1:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y_TD.sum().backward()


def test_second_derivatives_are_refused():
    routing = a_routing(9, 5, 2)
    given = operands(routing, "relu")
    y_TD = feed_forward(*given, plan_rows(routing), "relu", sink=Recording(*given[1:3]))
    with pytest.raises(RuntimeError, match="first derivatives alone; set their sink to None"):
        torch.autograd.grad(y_TD.sum(), given[0], create_graph=True)


def test_a_sink_gets_the_parameters_whatever_becomes_of_saved_tensors():
    routing, asked = a_routing(9, 5, 2), []
    given = operands(routing, "relu")
    sink = SimpleNamespace(consume=lambda weight, first, grad: asked.append(weight))
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy):
        y_TD = feed_forward(*given, plan_rows(routing), "relu", sink=sink)
    y_TD.sum().backward()
    assert {*map(id, asked)} == {*map(id, given[1:3])}


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_frozen_weight_is_not_given_away(frozen):
    routing = a_routing(9, 5, 2)
    given = operands(routing, "relu")
    given[frozen].requires_grad_(False)
    sink = Recording(*given[1:3])
    feed_forward(*given, plan_rows(routing), "relu", sink=sink).sum().backward()
    assert {address for address, _ in sink.calls} == {given[3 - frozen].data_ptr()}


def test_of_a_gradient_that_is_not_finite_nothing_is_given_away_and_the_input_hears_of_it():
    routing = a_routing(9, 5, 2)
    given, cotangent = operands(routing, "relu"), torch.randn(9, WIDTH, device=DEVICE)
    cotangent[3, 2] = torch.nan
    sink = Recording(*given[1:3])
    feed_forward(*given, plan_rows(routing), "relu", sink=sink).backward(cotangent)
    assert not sink.calls
    assert not given[0].grad.isfinite().all()


def test_without_gradients_wanted_nothing_is_given_away():
    routing = a_routing(9, 5, 2)
    given = operands(routing, "relu")
    sink = Recording(*given[1:3])
    with torch.no_grad():
        feed_forward(*given, plan_rows(routing), "relu", sink=sink)
    assert not sink.calls


def test_factored_updates_in_backward_are_a_backward_pass_and_then_a_step():
    """Experts without rows have a gradient of zeros, of which weights hear nothing."""
    chosen = torch.randint(4, (23, 1), device=DEVICE) + torch.arange(2, device=DEVICE)
    routing = a_routing(23, 6, 2, chosen=chosen)
    given = operands(routing, "relu")
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
        optimizer = FactoredAdam(leaves[1:3], lr=0.01)
        for _ in range(3):
            sink = optimizer if in_backward else None
            y_TD = feed_forward(*leaves, plan_rows(routing), "relu", sink=sink)
            y_TD.backward(torch.randn(23, WIDTH, device=DEVICE))
            optimizer.step()
            optimizer.zero_grad()
        found.append(
            [*leaves[1:3], *(optimizer.state[w][name] for w in leaves[1:3] for name in ("row", "col"))]
        )
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, scale=10)
    assert torch.equal(found[1][0][5], given[1][5])
