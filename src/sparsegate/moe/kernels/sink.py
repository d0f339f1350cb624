"""Weight gradients that are given away in backward, expert by expert, instead of being gathered in `.grad`.

The gradients of all experts are as large as the experts: of a model whose weights fill the memory they cannot
exist. A sink gets each of them as soon as it is made, and what it needs them for it does at once.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..dispatch import Plan
from . import expert_by_expert
from .activations import ActivationName
from .expert_by_expert import Rows
from .workers import Scratch


class GradientSink(Protocol):
    """What consumes the gradients of stacked weights while the backward pass goes on."""

    def consume(self, weight_EDH: Tensor, first_expert: int, grad_EDH: Tensor) -> None:
        """Take the gradient of some experts' matrices.

        Each backward pass calls it once with every matrix of experts that have rows, from several threads,
        when it will not read that matrix again: it may be changed in place.

        weight_EDH: the parameter. grad_EDH: of the experts from first_expert on, in the dtype of the
        products; its memory may be overwritten, and holds another gradient after the call.
        """


@torch.compiler.disable
def sunk_feed_forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    activation: ActivationName,
    dtype: torch.dtype,
    *,
    recompute: bool,
    sink: GradientSink,
) -> Tensor:
    """The threaded kernel; the weights' gradients go to the sink, and autograd is told of none.

    A gradient of y that is not finite at some token that counts is passed on, but nothing of it to the
    sink. dtype: of the products. First derivatives alone; where autograd finds that weights which it has yet
    to read were changed, as when one layer is used twice, it says so.
    """
    return _Sunk.apply(x_TD, w_in_EDS, w_out_EHD, weight_N, plan, activation, dtype, not recompute, sink)


class _Sunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_in_EDS: Tensor,
        w_out_EHD: Tensor,
        weight_N: Tensor,
        plan: Plan,
        activation: str,
        dtype: torch.dtype,
        keep: bool,
        sink: GradientSink,
    ) -> Tensor:
        y_TD, kept_NS = expert_by_expert.forward(
            x_TD, w_in_EDS, w_out_EHD, weight_N, plan, activation=activation, dtype=dtype, keep=keep
        )
        ctx.save_for_backward(x_TD, w_in_EDS, w_out_EHD, weight_N, kept_NS)
        # Activation checkpointing, and whatever else has a hook on what is saved, gives back others.
        ctx.parameters = w_in_EDS, w_out_EHD
        ctx.plan, ctx.activation, ctx.dtype, ctx.sink = plan, activation, dtype, sink
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _require_first_derivative()
        (grad_TD,) = grads
        x_TD, w_in_EDS, w_out_EHD, weight_N, kept_NS = ctx.saved_tensors
        in_parameter, out_parameter = ctx.parameters
        needs_x, needs_in, needs_out, needs_weight = ctx.needs_input_grad[:4]

        scratch = Scratch()

        def give(name: str, weight_EDH: Tensor, expert: int, left_ND: Tensor, right_NH: Tensor) -> None:
            grad_DH = scratch.empty(name, weight_EDH.shape[1:], left_ND.dtype)
            ctx.sink.consume(weight_EDH, expert, torch.mm(left_ND.t(), right_NH, out=grad_DH)[None])

        def sink(expert: int, rows: Rows) -> None:
            if needs_out:
                give("out", out_parameter, expert, rows.hidden_NH, rows.grad_out_ND)
            if needs_in:
                give("in", in_parameter, expert, rows.input_ND, rows.grad_in_NS)

        grad_x_TD, grad_weight_N = expert_by_expert.backward(
            grad_TD,
            x_TD,
            w_in_EDS,
            w_out_EHD,
            weight_N,
            ctx.plan,
            kept_NS,
            activation=ctx.activation,
            dtype=ctx.dtype,
            needs_x=needs_x,
            take=sink if (needs_in or needs_out) and _is_finite(grad_TD, ctx.plan) else None,
        )
        rest = (None,) * 5
        return grad_x_TD if needs_x else None, None, None, grad_weight_N if needs_weight else None, *rest


def _require_first_derivative() -> None:
    if torch.is_grad_enabled():  # as it is in a backward pass that is to be differentiated
        raise RuntimeError("experts with a sink have first derivatives alone; set their sink to None")


def _is_finite(grad_TD: Tensor, plan: Plan) -> bool:
    """Of the tokens that have experts; what stands at the others is never read."""
    token = plan.token_N[: int(plan.end_E[-1])].unique()
    return bool(grad_TD.index_select(0, token).isfinite().all())


def with_whole_gradients(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel that knows neither sinks nor weights of another dtype, as one that does: the plain twin.

    Each weight's gradient is made whole and then given to the sink, zeros for experts without rows; weights
    of another dtype are cast whole.
    """

    def feed_forward(
        x_TD: Tensor,
        w_in_EDS: Tensor,
        w_out_EHD: Tensor,
        weight_N: Tensor,
        plan: Plan,
        *,
        activation: ActivationName,
        recompute: bool,
        dtype: torch.dtype | None = None,
        sink: GradientSink | None = None,
    ) -> Tensor:
        inputs = [x_TD, w_in_EDS, w_out_EHD]
        if sink is not None:
            inputs[1:] = [_HandOver.apply(weight, sink) for weight in inputs[1:]]
        if dtype is not None:
            inputs = [tensor.to(dtype) for tensor in inputs]
        y_TD = kernel(*inputs, weight_N, plan, activation=activation, recompute=recompute)
        return y_TD.to(x_TD.dtype)

    return feed_forward


class _HandOver(torch.autograd.Function):
    """The weight itself; its gradient goes to the sink and no further."""

    @staticmethod
    def forward(ctx: Any, weight_EDH: Tensor, sink: GradientSink) -> Tensor:
        ctx.weight_EDH, ctx.sink = weight_EDH, sink
        return weight_EDH.view_as(weight_EDH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        _require_first_derivative()
        ctx.sink.consume(ctx.weight_EDH, 0, *grads)
        return None, None
