"""Weight gradients that are given away in backward, expert by expert, instead of being gathered in `.grad`.

The gradients of all experts are as large as the experts: of a model whose weights fill the memory they cannot
exist. A sink gets each of them as soon as it is made, and what it needs them for it does at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..dispatch import Plan
from .activations import ActivationName


class GradientSink(Protocol):
    """What consumes the gradients of stacked weights while the backward pass goes on."""

    def consume(self, weight_EDH: Tensor, first_expert: int, grad_EDH: Tensor) -> None:
        """Take the gradient of some experts' matrices.

        Each backward pass calls it once with every matrix of experts that have rows, from several threads,
        when it will not read that matrix again: it may be changed in place.

        weight_EDH: the parameter. grad_EDH: of the experts from first_expert on, in the dtype of the
        products; its memory may be overwritten, and holds another gradient after the call.
        """


class Give(NamedTuple):
    """Where a backward pass puts the gradients of some experts' matrices, with the first expert's number.

    None: none is wanted of this weight. As a sink is, each is called when that matrix is not read again.
    """

    w_in: Callable[[int, Tensor], None] | None
    w_out: Callable[[int, Tensor], None] | None


def into_sink(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Tensor]:
    """A `FeedForwardKernel` of two passes whose weights' gradients go to its sink; autograd is told of none.

    A gradient of y that is not finite at some token that counts is passed on, but nothing of it to the sink.
    First derivatives alone; where autograd finds that weights which it has yet to read were changed, as when
    one layer is used twice, it says so. The kernel must be told its dtype.

    forward: of x_TD, w_in_EDS, w_out_EHD, weight_N and plan, and by name activation, dtype, and keep; returns
    y_TD in x's dtype, and what backward is to know of each row, of no row unless `keep`. backward: of y's
    gradient, these five and what was kept, and by name activation, dtype, needs_x, and give, a `Give`;
    returns the gradients of x_TD, any tensor where it is not needed, and of weight_N.
    """

    @torch.compiler.disable
    def feed_forward(*inputs: Any, recompute: bool, sink: GradientSink, **options: Any) -> Tensor:
        return _Sunk.apply(*inputs, options, not recompute, sink, (forward, backward))

    return feed_forward


class _Sunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_in_EDS: Tensor,
        w_out_EHD: Tensor,
        weight_N: Tensor,
        plan: Plan,
        options: dict[str, Any],
        keep: bool,
        sink: GradientSink,
        passes: tuple[Callable[..., Any], Callable[..., Any]],
    ) -> Tensor:
        forward, ctx.backward_pass = passes
        y_TD, kept_NS = forward(x_TD, w_in_EDS, w_out_EHD, weight_N, plan, keep=keep, **options)
        ctx.save_for_backward(x_TD, w_in_EDS, w_out_EHD, weight_N, kept_NS)
        # Activation checkpointing, and whatever else has a hook on what is saved, gives back others.
        ctx.parameters = w_in_EDS, w_out_EHD
        ctx.plan, ctx.options, ctx.sink = plan, options, sink
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _require_first_derivative()
        (grad_TD,) = grads
        *inputs, kept_NS = ctx.saved_tensors
        needs_x, needs_in, needs_out, needs_weight = ctx.needs_input_grad[:4]
        in_parameter, out_parameter = ctx.parameters
        is_given = (needs_in or needs_out) and _is_finite(grad_TD, ctx.plan)
        give = Give(
            partial(ctx.sink.consume, in_parameter) if is_given and needs_in else None,
            partial(ctx.sink.consume, out_parameter) if is_given and needs_out else None,
        )
        grad_x_TD, grad_weight_N = ctx.backward_pass(
            grad_TD, *inputs, ctx.plan, kept_NS, needs_x=needs_x, give=give, **ctx.options
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
