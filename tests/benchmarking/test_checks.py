"""What is right passes, and each fault that is planted is found."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparsegate.benchmarking import layer
from sparsegate.benchmarking.checks import WrongResult, check, check_layer
from sparsegate.benchmarking.contestants import own
from sparsegate.benchmarking.layer import (
    Batch,
    make_batch,
    make_layer,
    own_experts,
    own_layer,
    own_sunk_experts,
    parts,
    plain_loop,
)
from sparsegate.benchmarking.shape import Shape
from sparsegate.moe.layer import MoE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(6, 2), (2, 2), (5, 1)])
def test_ours_and_the_plain_loop_pass_and_leave_no_gradient(
    shape: Shape, experts: int, k: int, training: bool
):
    shape = replace(shape, experts=experts, k=k)
    moe = make_layer(shape).train(training)
    batch = make_batch(shape, moe)
    check_layer(moe, batch, training=training)
    for contestant in [*own(shape, moe), plain_loop(shape, moe)]:
        check(contestant, batch, training=training)
        assert all(leaf.grad is None for leaf in (*contestant.parameters, *batch[:2], batch.routing.weight_N))


class Scaled(torch.autograd.Function):
    """Leaves values as they are, and doubles the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


FAULTS = {
    "output: its shape": lambda y, x, weight: y[:, :-1],
    "output: not finite": lambda y, x, weight: y * 0,
    "output: differs": lambda y, x, weight: 1.1 * y,
    "gradient of x: differs": lambda y, x, weight: y + (Scaled.apply(x) - x),
    "gradient of G": lambda y, x, weight: y + (Scaled.apply(weight) - weight).sum(),
    "gradient of w_in of": lambda y, x, weight: y,
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_wrong_layer_is_found(message: str, shape: Shape, moe: MoE, batch: Batch):
    right = own_experts(shape, moe)
    if message.startswith("gradient of w_in"):
        moe.experts.w_in.register_hook(lambda grad: 1.1 * grad)

    def wrong(x_TD, routing):
        y_TD, loss = right.forward(x_TD, routing)
        return FAULTS[message](y_TD, x_TD, routing.weight_N), loss

    if "its shape" in message:  # found without a backward pass, which could not be made
        with pytest.raises(WrongResult, match=message):
            check(replace(right, forward=wrong), batch, training=False)
        return
    with pytest.raises(WrongResult, match=message if "finite" not in message else "none, or zero|not finite"):
        check(replace(right, forward=wrong), batch, training=True)


@pytest.mark.parametrize(
    ("factor", "message"), [(1.1, "gradient of w_out of"), (None, "w_out has no gradient of expert")]
)
def test_a_gradient_that_reaches_the_sink_wrong_or_not_at_all_is_found(
    factor: float | None, message: str, moe: MoE, shape: Shape, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    contestant, consume = own_sunk_experts(shape, moe), layer._Forgetting.consume

    def wrong(self, weight_EDH: Tensor, first_expert: int, grad_EDH: Tensor) -> None:
        if weight_EDH is moe.experts.w_in:
            consume(self, weight_EDH, first_expert, grad_EDH)
        elif factor is not None:
            consume(self, weight_EDH, first_expert, factor * grad_EDH)

    monkeypatch.setattr(layer._Forgetting, "consume", wrong)
    with pytest.raises(WrongResult, match=message):
        check(contestant, batch, training=True)


def test_hidden_units_that_rounding_decides_are_not_compared(shape: Shape, moe: MoE, batch: Batch):
    with torch.no_grad():
        moe.experts.w_in[:, :, 1] = 0

    def doubled(unit: int) -> Callable[[Tensor], Tensor]:
        factor_H = torch.ones(shape.hidden, dtype=moe.experts.w_out.dtype).index_fill(
            0, torch.tensor([unit]), 2
        )
        return lambda grad: grad * factor_H[:, None] + (factor_H - 1)[:, None]

    hook = moe.experts.w_out.register_hook(doubled(1))
    check(own_experts(shape, moe), batch, training=True)
    hook.remove()
    moe.experts.w_out.register_hook(doubled(0))
    with pytest.raises(WrongResult, match="gradient of w_out"):
        check(own_experts(shape, moe), batch, training=True)


def test_a_parameter_without_gradient_is_found(shape: Shape, moe: MoE, batch: Batch):
    idle = nn.Parameter(torch.ones(3))
    layer = own_layer(shape, moe)
    with pytest.raises(WrongResult, match=r"all parameters of shape \[3\]: none, or zero"):
        check(replace(layer, parameters=[*layer.parameters, idle]), batch, training=True)


@pytest.mark.parametrize("name", ["w_gate", "w_noise"])
def test_a_wrong_gradient_of_the_gate_is_found(name: str, moe: MoE, batch: Batch):
    moe.gate.get_parameter(name).register_hook(lambda grad: 1.1 * grad)
    with pytest.raises(WrongResult, match=f"gradient of {name}"):
        check_layer(moe, batch, training=True)


def test_the_parts_of_routing_leave_no_gradient(moe: MoE, batch: Batch):
    for part in parts(moe, batch).values():
        part()
    leaves = [*moe.parameters(), batch.x_TD, batch.routing.weight_N]
    assert all(leaf.grad is None for leaf in leaves)
