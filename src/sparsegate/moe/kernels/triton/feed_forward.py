"""Feed-forward experts as one operator: its forward and backward passes put together from the kernels."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Plan
from ...precision import product_dtype
from ..activations import ActivationName
from ..sink import Give, GradientSink, into_sink
from .gather_sum import sum_of_rows
from .hidden_gradient import hidden_gradient
from .rows import product_rows
from .schedule import Schedule, make_schedule
from .up import hidden_rows
from .weight_gradient import weight_gradient

_HALF = (torch.bfloat16, torch.float16)
_ACTIVATIONS = ("relu", "swiglu")
# Of the weight gradients that a sink gets at once, beside which it makes several such tensors of float32.
_NUMBERS_GIVEN = 1 << 25


def feed_forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    activation: ActivationName,
    *,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    sink: GradientSink | None = None,
) -> Tensor:
    """Sum over each token's pairs of weight * act(x W_in[e]) W_out[e]: y_TD in x's dtype.

    w_in_EDS: S = H for "relu"; S = 2H for "swiglu", silu(x W) * (x V), whose first half of columns is W.
    w_out_EHD: of one dtype with w_in and x, float32, bfloat16 or float16, or under autocast cast to one.
    weight_N: float32, in the order of the pairs. recompute: keep nothing for backward but the arguments, and
    compute the hidden rows again (appendix D). dtype, sink: a `FeedForwardKernel`'s. Weights of 16 bits are
    cast to float32 tile by tile, others whole; the sink gets the gradients of some experts at a time, zeros
    for those without rows.

    First derivatives alone: the fused backward pass has no derivative of its own, and to take it apart only
    for the second one would be another, far slower kernel under this one's name.
    """
    dtype = product_dtype(x_TD, w_in_EDS, w_out_EHD) if dtype is None else dtype
    _check(x_TD, w_in_EDS, w_out_EHD, activation, dtype)
    is_trained = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x_TD, w_in_EDS, w_out_EHD, weight_N)
    )
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
        plan,
        activation=activation,
        dtype=dtype,
        keep=is_trained and not recompute,
    )
    return y_TD


def _forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    *,
    activation: ActivationName,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y_TD, and what was kept of the hidden rows."""
    own_dtype = x_TD.dtype
    x_TD, w_in_EDS, w_out_EHD = x_TD.to(dtype), _operand(w_in_EDS, dtype), _operand(w_out_EHD, dtype)
    schedule = make_schedule(plan.end_E, plan.order_N.shape[0])
    return _feed_forward(
        x_TD,
        w_in_EDS,
        w_out_EHD,
        weight_N.to(torch.float32),
        plan.order_N,
        plan.row_N,
        plan.token_N,
        plan.pairs_T,
        *schedule,
        plan.pairs_per_token,
        activation == "swiglu",
        keep,
        own_dtype,
    )


def _operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Stacked weights as the kernels of that dtype take them: a copy only where they cannot cast a tile."""
    return weight if dtype == torch.float32 and weight.dtype in _HALF else weight.to(dtype)


def _check(x_TD: Tensor, w_in_EDS: Tensor, w_out_EHD: Tensor, activation: str, dtype: torch.dtype) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is none of {', '.join(map(repr, _ACTIVATIONS))}")
    if dtype not in (torch.float32, *_HALF):
        raise ValueError(
            f"dtype ({dtype}): the kernel 'triton' computes in float32, bfloat16 and float16; use 'loop'"
        )
    width, hidden = x_TD.shape[1], w_out_EHD.shape[1]
    columns = hidden * (2 if activation == "swiglu" else 1)
    if w_in_EDS.shape[1:] != (width, columns) or w_out_EHD.shape[2] != width:
        raise ValueError(
            f"w_in {tuple(w_in_EDS.shape)}, w_out {tuple(w_out_EHD.shape)}: {activation} experts of width"
            f" {width} have [E, {width}, {columns}] and [E, {hidden}, {width}]"
        )


@torch.library.custom_op("sparsegate::triton_feed_forward", mutates_args=())
def _feed_forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    order_N: Tensor,
    row_N: Tensor,
    token_N: Tensor,
    pairs_T: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    pairs_per_token: int | None,
    gated: bool,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y_TD, and what backward is to know of the hidden rows: nothing, unless `keep` is set."""
    schedule = Schedule(expert_of_tile, first_tile_E1, first_row_E1)
    hidden_NH, pre_NS = hidden_rows(_aligned(x_TD), w_in_EDS, token_N, schedule, gated=gated, keep=keep)
    rows_ND = product_rows(hidden_NH, w_out_EHD, schedule)
    y_TD = sum_of_rows(
        rows_ND, weight_N, row_N, pairs_T, schedule, pairs_per_token=pairs_per_token, dtype=dtype
    )
    return y_TD, _kept(hidden_NH, pre_NS, gated) if keep else x_TD.new_empty(0, w_in_EDS.shape[2])


@_feed_forward.register_fake
def _(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    order_N: Tensor,
    row_N: Tensor,
    token_N: Tensor,
    pairs_T: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    pairs_per_token: int | None,
    gated: bool,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    kept = x_TD.new_empty(order_N.shape[0] if keep else 0, w_in_EDS.shape[2])
    return x_TD.new_empty(x_TD.shape, dtype=dtype), kept


@torch.library.custom_op("sparsegate::triton_hidden", mutates_args=())
def _hidden(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    token_N: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    gated: bool,
) -> Tensor:
    """What backward is to know of the hidden rows, computed again."""
    schedule = Schedule(expert_of_tile, first_tile_E1, first_row_E1)
    hidden_NH, pre_NS = hidden_rows(_aligned(x_TD), w_in_EDS, token_N, schedule, gated=gated, keep=True)
    return _kept(hidden_NH, pre_NS, gated)


@_hidden.register_fake
def _(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    token_N: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    gated: bool,
) -> Tensor:
    return x_TD.new_empty(token_N.shape[0], w_in_EDS.shape[2])


@torch.library.custom_op("sparsegate::triton_hidden_gradient", mutates_args=())
def _hidden_gradient(
    grad_y_TD: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    kept: Tensor,
    order_N: Tensor,
    token_N: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `hidden_gradient`."""
    schedule = Schedule(expert_of_tile, first_tile_E1, first_row_E1)
    return hidden_gradient(
        _aligned(grad_y_TD), w_out_EHD, weight_N, kept, order_N, token_N, schedule, gated=gated
    )


@_hidden_gradient.register_fake
def _(
    grad_y_TD: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    kept: Tensor,
    order_N: Tensor,
    token_N: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_NH = kept.new_empty(order_N.shape[0], w_out_EHD.shape[1])
    return torch.empty_like(kept), hidden_NH, torch.empty_like(weight_N)


@torch.library.custom_op("sparsegate::triton_input_gradient", mutates_args=())
def _input_gradient(
    grad_pre_NS: Tensor,
    w_in_EDS: Tensor,
    row_N: Tensor,
    pairs_T: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    pairs_per_token: int | None,
) -> Tensor:
    """Each row's gradient times the transpose of its expert's matrix, summed over the rows of each token."""
    schedule = Schedule(expert_of_tile, first_tile_E1, first_row_E1)
    rows_ND = product_rows(grad_pre_NS, w_in_EDS.transpose(1, 2), schedule)
    return sum_of_rows(
        rows_ND, None, row_N, pairs_T, schedule, pairs_per_token=pairs_per_token, dtype=rows_ND.dtype
    )


@_input_gradient.register_fake
def _(
    grad_pre_NS: Tensor,
    w_in_EDS: Tensor,
    row_N: Tensor,
    pairs_T: Tensor,
    expert_of_tile: Tensor,
    first_tile_E1: Tensor,
    first_row_E1: Tensor,
    pairs_per_token: int | None,
) -> Tensor:
    return grad_pre_NS.new_empty(pairs_T.shape[0], w_in_EDS.shape[1])


@torch.library.custom_op("sparsegate::triton_weight_gradient", mutates_args=())
def _weight_gradient(
    left: Tensor,
    right: Tensor,
    token_N: Tensor,
    first_row_E1: Tensor,
    first_expert: int,
    end_expert: int,
    gather_left: bool,
) -> Tensor:
    """See `weight_gradient`."""
    left, right, experts = _aligned(left), _aligned(right), range(first_expert, end_expert)
    return weight_gradient(left, right, token_N, first_row_E1, experts, gather_left=gather_left)


@_weight_gradient.register_fake
def _(
    left: Tensor,
    right: Tensor,
    token_N: Tensor,
    first_row_E1: Tensor,
    first_expert: int,
    end_expert: int,
    gather_left: bool,
) -> Tensor:
    return left.new_empty(end_expert - first_expert, left.shape[1], right.shape[1])


def _kept(hidden_NH: Tensor, pre_NS: Tensor, gated: bool) -> Tensor:
    return pre_NS if gated else hidden_NH


def _aligned(rows: Tensor) -> Tensor:
    """Rows whose elements stand side by side, as loads of several at a time need: y.sum() gives others."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or zeros would be made for what is kept
    *tensors, ctx.pairs_per_token, ctx.gated, ctx.keep, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_y_TD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x_TD, w_in_EDS, w_out_EHD, weight_N, order_N, row_N, token_N, pairs_T, *schedule, kept = ctx.saved_tensors
    grad_y_TD = grad_y_TD.to(x_TD.dtype)
    if not ctx.keep:
        kept = _hidden(x_TD, w_in_EDS, token_N, *schedule, ctx.gated)
    grad_pre_NS, weighted_NH, grad_weight_N = _hidden_gradient(
        grad_y_TD, w_out_EHD, weight_N, kept, order_N, token_N, *schedule, ctx.gated
    )
    grad_x_TD = grad_w_in_EDS = grad_w_out_EHD = None
    if ctx.needs_input_grad[0]:
        grad_x_TD = _input_gradient(grad_pre_NS, w_in_EDS, row_N, pairs_T, *schedule, ctx.pairs_per_token)
    some = token_N, schedule[2], 0, w_in_EDS.shape[0]
    if ctx.needs_input_grad[1]:
        grad_w_in_EDS = _weight_gradient(x_TD, grad_pre_NS, *some, True).to(w_in_EDS.dtype)
    if ctx.needs_input_grad[2]:
        grad_w_out_EHD = _weight_gradient(weighted_NH, grad_y_TD, *some, False).to(w_out_EHD.dtype)
    return grad_x_TD, grad_w_in_EDS, grad_w_out_EHD, grad_weight_N, *[None] * 11


def _giving_backward(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    kept: Tensor,
    *,
    activation: ActivationName,
    dtype: torch.dtype,
    needs_x: bool,
    give: Give,
) -> tuple[Tensor, Tensor]:
    """`_backward` of which the weights' gradients are made for as many experts at once as are given away."""
    own_dtype, (num_experts, *matrix) = x_TD.dtype, w_in_EDS.shape
    grad_x_TD, x_TD, grad_y_TD = x_TD, x_TD.to(dtype), grad_y_TD.to(dtype)
    w_in_EDS, w_out_EHD = _operand(w_in_EDS, dtype), _operand(w_out_EHD, dtype)
    schedule, token_N, gated = (
        make_schedule(plan.end_E, len(plan.order_N)),
        plan.token_N,
        activation == "swiglu",
    )
    if not len(kept):
        kept = _hidden(x_TD, w_in_EDS, token_N, *schedule, gated)
    grad_pre_NS, weighted_NH, grad_weight_N = _hidden_gradient(
        grad_y_TD, w_out_EHD, weight_N.to(torch.float32), kept, plan.order_N, token_N, *schedule, gated
    )
    if needs_x:
        pairs = plan.row_N, plan.pairs_T
        grad_x_TD = _input_gradient(grad_pre_NS, w_in_EDS, *pairs, *schedule, plan.pairs_per_token)
    del w_in_EDS, w_out_EHD  # which may be copies
    together = max(1, _NUMBERS_GIVEN // max(1, prod(matrix)))
    for first in range(0, num_experts, together):
        some = token_N, schedule.first_row_E1, first, min(num_experts, first + together)
        if give.w_out is not None:
            give.w_out(first, _weight_gradient(weighted_NH, grad_y_TD, *some, False))
        if give.w_in is not None:
            give.w_in(first, _weight_gradient(x_TD, grad_pre_NS, *some, True))
    return grad_x_TD.to(own_dtype), grad_weight_N.to(weight_N.dtype)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("second derivatives: the kernel 'triton' has none; use the kernel 'loop'")


_feed_forward.register_autograd(_backward, setup_context=_save)
for _operator in (_hidden, _hidden_gradient, _input_gradient, _weight_gradient):
    _operator.register_autograd(_no_second_derivative)
_sunk_feed_forward = into_sink(_forward, _giving_backward)
