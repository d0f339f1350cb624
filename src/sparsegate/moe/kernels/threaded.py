"""Experts on the CPU, expert by expert: gather, both products and activation while its rows are in the cache.

One operator forward and one backward. Experts with few rows are computed side by side, one thread each; the
others one after the other with all threads. What a token's experts return is summed in the order of its
pairs, so that the result depends neither on which thread was first nor on chance.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Plan
from ..precision import autocast_off, product_dtype
from . import unfused
from .activations import ACTIVATIONS, ActivationName
from .grouped import grouped_product
from .memory import recycled_empty
from .products import multiply, product
from .workers import in_parallel

# As many rows for each thread keep one product as fast as several products side by side.
_ROWS_PER_THREAD = 128


def feed_forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    *,
    activation: ActivationName,
    recompute: bool,
) -> Tensor:
    """y_t = sum over the pairs of t of weight * act(x_t w_in) w_out. The arguments are those of `unfused`."""
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
        product_dtype(x_TD, w_in_EDS, w_out_EHD),
        torch.is_grad_enabled() and not recompute,
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
    """Return y_TD, and what the activation keeps of each row, [N, S]: of no row unless `keep`.

    dtype: of the products. The tensors from order_N to pairs_T are those of a Plan.
    """
    act, num_rows = ACTIVATIONS[activation], len(token_N)
    weight_N1 = weight_N[order_N][:, None]
    kept_NS = recycled_empty(num_rows if keep else 0, w_in_EDS.shape[2], dtype=dtype)
    rows_ND = recycled_empty(num_rows, x_TD.shape[1], dtype=torch.promote_types(dtype, weight_N.dtype))

    def compute(task: _Task) -> None:
        expert, rows = task
        in_NS = product(x_TD.index_select(0, token_N[rows]).to(dtype), w_in_EDS[expert].to(dtype))
        if keep:
            act.keep(in_NS, out=kept_NS[rows])
            hidden_NH = act.hidden(kept_NS[rows])
        else:
            hidden_NH = act(in_NS)
        torch.mul(product(hidden_NH, w_out_EHD[expert].to(dtype)), weight_N1[rows], out=rows_ND[rows])

    with autocast_off(x_TD.device), torch.no_grad():
        _for_each(compute, _tasks(end_E))
        num_used = int(end_E[-1])
        rows_ND[num_used:].zero_()
        kept_NS[num_used:].zero_()
        return _sum_of_pairs(rows_ND, row_N, pairs_T, pairs_per_token).to(x_TD.dtype), kept_NS


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
    """Return the gradients of x_TD, w_in_EDS, w_out_EHD and weight_N; empty ones where not needed.

    The gradient of a gate's weight is the product of an expert's output with y's gradient. It equals that of
    the hidden layer with its gradient, so that no output need be kept.
    """
    act, num_rows, wide = ACTIVATIONS[activation], len(token_N), torch.promote_types(dtype, weight_N.dtype)
    weight_N1 = weight_N[order_N][:, None]
    grad_in_EDS = recycled_empty(*_if(needs_weights, w_in_EDS.shape), dtype=w_in_EDS.dtype)
    grad_out_EHD = recycled_empty(*_if(needs_weights, w_out_EHD.shape), dtype=w_out_EHD.dtype)
    grad_rows_ND = recycled_empty(*_if(needs_x, (num_rows, x_TD.shape[1])), dtype=dtype)
    grad_weight_N = weight_N.new_zeros(num_rows, dtype=wide)

    def compute(task: _Task) -> None:
        expert, rows = task
        token, w_in_DS, w_out_HD = token_N[rows], w_in_EDS[expert].to(dtype), w_out_EHD[expert].to(dtype)
        input_ND = x_TD.index_select(0, token).to(dtype)
        if len(kept_NS):
            kept = kept_NS[rows]
        else:
            kept = product(input_ND, w_in_DS)
            act.keep(kept, out=kept)
        hidden_NH, grad_ND = act.hidden(kept), grad_TD.index_select(0, token).to(dtype)
        grad_NH = product(grad_ND, w_out_HD.t())
        torch.sum(grad_NH * hidden_NH, dim=1, dtype=wide, out=grad_weight_N[rows])
        grad_NS = act.gradient(grad_NH.mul_(weight_N1[rows]), kept)
        if needs_weights:
            _multiply_into(grad_out_EHD[expert], hidden_NH.t(), grad_ND.mul_(weight_N1[rows]))
            _multiply_into(grad_in_EDS[expert], input_ND.t(), grad_NS)
        if needs_x:
            multiply(grad_NS, w_in_DS.t(), out=grad_rows_ND[rows])

    with autocast_off(x_TD.device), torch.no_grad():
        _for_each(compute, _tasks(end_E))
        if needs_weights:
            for expert in _unused(end_E):
                grad_in_EDS[expert].zero_()
                grad_out_EHD[expert].zero_()
        grad_x_TD = grad_rows_ND
        if needs_x:
            grad_rows_ND[int(end_E[-1]) :].zero_()
            grad_x_TD = _sum_of_pairs(grad_rows_ND, row_N, pairs_T, pairs_per_token)
        return (
            grad_x_TD.to(x_TD.dtype),
            grad_in_EDS,
            grad_out_EHD,
            grad_weight_N[row_N].to(weight_N.dtype),
        )


class _Task(NamedTuple):
    """One expert and its rows."""

    expert: int
    rows: slice


def _tasks(end_E: Tensor) -> list[_Task]:
    """One for each expert that has rows, the heaviest first, so that no thread begins it last."""
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    used = count_E.nonzero().squeeze(1)
    used = used[count_E[used].argsort(descending=True, stable=True)]
    return [
        _Task(expert, slice(end - count, end))
        for expert, end, count in zip(
            used.tolist(), end_E[used].tolist(), count_E[used].tolist(), strict=True
        )
    ]


def _unused(end_E: Tensor) -> list[int]:
    return end_E.diff(prepend=end_E.new_zeros(1)).eq(0).nonzero().squeeze(1).tolist()


def _for_each(compute: Callable[[_Task], None], tasks: list[_Task]) -> None:
    num_threads = torch.get_num_threads()
    num_rows = sum(task.rows.stop - task.rows.start for task in tasks)
    # An expert that has more than a thread's fair share would keep the others waiting.
    alone = min(_ROWS_PER_THREAD * num_threads, num_rows // num_threads + 1)
    few: list[int] = []
    for index, task in enumerate(tasks):
        if task.rows.stop - task.rows.start >= alone:
            compute(task)
        else:
            few.append(index)
    in_parallel(lambda index: compute(tasks[index]), few)


def _if(needed: bool, shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(shape) if needed else (0,)


def _multiply_into(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right into a weight's gradient, whose dtype may be wider than the product's."""
    if gradient.dtype == left.dtype:
        torch.mm(left, right, out=gradient)
    else:
        gradient.copy_(torch.mm(left, right))


def _sum_of_pairs(rows_ND: Tensor, row_N: Tensor, pairs_T: Tensor, pairs_per_token: int | None) -> Tensor:
    """Sum each token's rows in the order of its pairs; in float32 at least, rounded once."""
    if pairs_per_token is not None:
        return F.embedding_bag(row_N.view(-1, pairs_per_token), rows_ND, mode="sum")
    return F.embedding_bag(row_N, rows_ND, pairs_T.cumsum(0) - pairs_T, mode="sum")


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
        y_TD = unfused.feed_forward(
            x_TD,
            w_in_EDS,
            w_out_EHD,
            weight_N,
            plan,
            activation=ctx.activation,
            recompute=False,
            product=grouped_product,
        )
        inputs = (x_TD, w_in_EDS, w_out_EHD, weight_N)
        wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(y_TD, wanted, grad_TD, create_graph=True))
        return *(next(found) if needed else None for needed in needs), *rest
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
