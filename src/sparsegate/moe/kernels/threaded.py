"""Experts on the CPU as one operator forward and one backward; `expert_by_expert.py` is what they do."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Plan
from ..precision import autocast_off, product_dtype
from . import expert_by_expert, unfused
from .activations import ActivationName
from .expert_by_expert import Rows
from .grouped import grouped_product
from .groups import without_rows
from .higher_order import gradients_through
from .memory import recycled_empty
from .sink import Give, GradientSink, into_sink
from .workers import Scratch


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
    """y_t = sum over the pairs of t of weight * act(x_t w_in) w_out; arguments as a `FeedForwardKernel`'s."""
    dtype = product_dtype(x_TD, w_in_EDS, w_out_EHD) if dtype is None else dtype
    is_trained = torch.is_grad_enabled()
    if sink is not None and is_trained:
        return _sunk_feed_forward(
            x_TD,
            w_in_EDS,
            w_out_EHD,
            weight_N,
            plan,
            activation=activation,
            dtype=dtype,
            recompute=recompute,
            sink=sink,
        )
    y_TD, _ = _forward(
        x_TD,
        w_in_EDS,
        w_out_EHD,
        weight_N,
        plan.order_N,
        plan.row_N,
        plan.token_N,
        plan.end_E,
        plan.pairs_T,
        plan.pairs_per_token,
        activation,
        dtype,
        is_trained and not recompute,
    )
    return y_TD


@torch.library.custom_op("sparsegate::threaded_experts", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    order_N: Tensor,
    row_N: Tensor,
    token_N: Tensor,
    end_E: Tensor,
    pairs_T: Tensor,
    pairs_per_token: int | None,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y_TD and what the backward pass is to know of each row."""
    plan = Plan(
        order_N=order_N,
        row_N=row_N,
        token_N=token_N,
        end_E=end_E,
        pairs_T=pairs_T,
        pairs_per_token=pairs_per_token,
    )
    return expert_by_expert.forward(
        x_TD, w_in_EDS, w_out_EHD, weight_N, plan, activation=activation, dtype=dtype, keep=keep
    )


@torch.library.custom_op("sparsegate::threaded_experts_backward", mutates_args=())
def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    order_N: Tensor,
    row_N: Tensor,
    token_N: Tensor,
    end_E: Tensor,
    pairs_T: Tensor,
    kept_NS: Tensor,
    pairs_per_token: int | None,
    activation: str,
    dtype: torch.dtype,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x_TD, w_in_EDS, w_out_EHD and weight_N; empty ones where not needed."""
    plan = Plan(
        order_N=order_N,
        row_N=row_N,
        token_N=token_N,
        end_E=end_E,
        pairs_T=pairs_T,
        pairs_per_token=pairs_per_token,
    )
    grad_in_EDS = recycled_empty(*_if(needs_weights, w_in_EDS.shape), dtype=w_in_EDS.dtype)
    grad_out_EHD = recycled_empty(*_if(needs_weights, w_out_EHD.shape), dtype=w_out_EHD.dtype)

    def write(expert: int, rows: Rows) -> None:
        _multiply_into(grad_out_EHD[expert], rows.hidden_NH.t(), rows.grad_out_ND)
        _multiply_into(grad_in_EDS[expert], rows.input_ND.t(), rows.grad_in_NS)

    grad_x_TD, grad_weight_N = expert_by_expert.backward(
        grad_TD,
        x_TD,
        w_in_EDS,
        w_out_EHD,
        weight_N,
        plan,
        kept_NS,
        activation=activation,
        dtype=dtype,
        needs_x=needs_x,
        take=write if needs_weights else None,
    )
    if needs_weights:
        for expert in without_rows(end_E):
            grad_in_EDS[expert].zero_()
            grad_out_EHD[expert].zero_()
    return grad_x_TD, grad_in_EDS, grad_out_EHD, grad_weight_N


def _if(needed: bool, shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(shape) if needed else (0,)


def _multiply_into(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right into a weight's gradient, whose dtype may be wider than the product's."""
    if gradient.dtype == left.dtype:
        torch.mm(left, right, out=gradient)
    else:
        gradient.copy_(torch.mm(left, right))


@_forward.register_fake
def _(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    order_N: Tensor,
    row_N: Tensor,
    token_N: Tensor,
    end_E: Tensor,
    pairs_T: Tensor,
    pairs_per_token: int | None,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    num_kept = weight_N.shape[0] if keep else 0
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(num_kept, w_in_EDS.shape[2], dtype=dtype)


@_backward.register_fake
def _(
    grad_TD: Tensor,
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    order_N: Tensor,
    row_N: Tensor,
    token_N: Tensor,
    end_E: Tensor,
    pairs_T: Tensor,
    kept_NS: Tensor,
    pairs_per_token: int | None,
    activation: str,
    dtype: torch.dtype,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x_TD.new_empty(_if(needs_x, x_TD.shape)),
        w_in_EDS.new_empty(_if(needs_weights, w_in_EDS.shape)),
        w_out_EHD.new_empty(_if(needs_weights, w_out_EHD.shape)),
        weight_N.new_empty(weight_N.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pairs_per_token, ctx.activation, ctx.dtype, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_TD: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x_TD, w_in_EDS, w_out_EHD, weight_N, order_N, row_N, token_N, end_E, pairs_T, kept_NS = ctx.saved_tensors
    needs, rest = ctx.needs_input_grad[:4], (None,) * 9
    if grad_TD is None:
        return None, None, None, None, *rest
    if torch.is_grad_enabled():  # derivatives of this backward are wanted: by operators that have them
        plan = Plan(
            order_N=order_N,
            row_N=row_N,
            token_N=token_N,
            end_E=end_E,
            pairs_T=pairs_T,
            pairs_per_token=ctx.pairs_per_token,
        )

        def function(x_TD: Tensor, w_in_EDS: Tensor, w_out_EHD: Tensor, weight_N: Tensor) -> list[Tensor]:
            y_TD = unfused.feed_forward(
                x_TD.to(ctx.dtype),
                w_in_EDS.to(ctx.dtype),
                w_out_EHD.to(ctx.dtype),
                weight_N,
                plan,
                activation=ctx.activation,
                recompute=False,
                product=grouped_product,
            )
            return [y_TD.to(x_TD.dtype)]

        with autocast_off(x_TD.device):
            found = gradients_through(function, (x_TD, w_in_EDS, w_out_EHD, weight_N), needs, [grad_TD])
        return *found, *rest
    found = _backward(
        grad_TD,
        x_TD,
        w_in_EDS,
        w_out_EHD,
        weight_N,
        order_N,
        row_N,
        token_N,
        end_E,
        pairs_T,
        kept_NS,
        ctx.pairs_per_token,
        ctx.activation,
        ctx.dtype,
        needs[0],
        needs[1] or needs[2],
    )
    return *(grad if needed else None for grad, needed in zip(found, needs, strict=True)), *rest


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _giving_backward(grad_TD: Tensor, *inputs: Any, give: Give, **options: Any) -> tuple[Tensor, Tensor]:
    """Give each expert's gradients away as soon as they are made, in a memory that the next one's take."""
    scratch = Scratch()

    def take(expert: int, rows: Rows) -> None:
        for name, accept, left_ND, right_NH in (
            ("out", give.w_out, rows.hidden_NH, rows.grad_out_ND),
            ("in", give.w_in, rows.input_ND, rows.grad_in_NS),
        ):
            if accept is not None:
                shape = torch.Size((left_ND.shape[1], right_NH.shape[1]))
                grad_DH = scratch.empty(name, shape, left_ND.dtype)
                accept(expert, torch.mm(left_ND.t(), right_NH, out=grad_DH)[None])

    is_wanted = give.w_in is not None or give.w_out is not None
    return expert_by_expert.backward(grad_TD, *inputs, take=take if is_wanted else None, **options)


_sunk_feed_forward = into_sink(expert_by_expert.forward, _giving_backward)
