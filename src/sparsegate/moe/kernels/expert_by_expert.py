"""Experts on the CPU, expert by expert: what the forward and the backward pass do, without autograd.

An expert's rows are gathered, multiplied, activated and multiplied again while they are in the cache; where
experts have few, several at once are gathered and activated. What a token's experts return is summed in the
order of its pairs, so that the result depends neither on which thread was first nor on chance. Forward, the
products of few rows may be made at once as well (`row_by_row.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Plan
from ..precision import autocast_off
from . import row_by_row
from .activations import ACTIVATIONS
from .groups import Group, for_each, groups_of
from .memory import recycled_empty
from .products import multiply, product
from .workers import Scratch

Product = Callable[[Tensor], Tensor]
Matrix = Callable[[int], Tensor]

# Of a temporary of several experts, and of their matrices, which are to stay in the cache from one product to
# the next.
_ROW_NUMBERS_PER_GROUP, _WEIGHT_NUMBERS_PER_GROUP = 1 << 16, 1 << 19


class Rows(NamedTuple):
    """What the gradients of one expert's weights are made of: w_in's of input and grad_in, w_out's likewise.

    input_ND, grad_in_NS: of the first product. hidden_NH, grad_out_ND: of the second.
    """

    input_ND: Tensor
    grad_in_NS: Tensor
    hidden_NH: Tensor
    grad_out_ND: Tensor


def forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    *,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y_TD, and what the activation keeps of each row, [N, S]: of no row unless `keep`.

    dtype: of the products.
    """
    act, num_rows = ACTIVATIONS[activation], len(plan.token_N)
    weight_N1 = weight_N[plan.order_N][:, None]
    kept_NS = recycled_empty(num_rows if keep else 0, w_in_EDS.shape[2], dtype=dtype)
    rows_ND = recycled_empty(num_rows, x_TD.shape[1], dtype=torch.promote_types(dtype, weight_N.dtype))

    def compute(rows: slice, times_in: Product, times_out: Product) -> None:
        in_NS = times_in(x_TD.index_select(0, plan.token_N[rows]).to(dtype))
        if keep:
            act.keep(in_NS, out=kept_NS[rows])
            hidden_NH = act.hidden(kept_NS[rows])
        else:
            hidden_NH = act(in_NS)
        torch.mul(times_out(hidden_NH), weight_N1[rows], out=rows_ND[rows])

    scratch = Scratch()

    def compute_group(group: Group) -> None:
        times_in, times_out = (
            partial(_products, group=group, matrix=partial(scratch.cast, weight, dtype))
            for weight in (w_in_EDS, w_out_EHD)
        )
        compute(group.rows, times_in, times_out)

    with autocast_off(x_TD.device), torch.no_grad():
        num_used = int(plan.end_E[-1])
        count_E = plan.end_E.diff(prepend=plan.end_E.new_zeros(1))
        if row_by_row.suits(count_E, (w_in_EDS, w_out_EHD), dtype):
            expert_N = torch.searchsorted(plan.end_E, torch.arange(num_used, device=x_TD.device), right=True)
            for rows in row_by_row.in_turn(num_used, *w_in_EDS.shape[1:]):
                times_in, times_out = (
                    partial(row_by_row.products, weight_EDH=weight, expert_N=expert_N[rows])
                    for weight in (w_in_EDS, w_out_EHD)
                )
                compute(rows, times_in, times_out)
        else:
            for_each(compute_group, _groups(plan, w_in_EDS))
        rows_ND[num_used:].zero_()
        kept_NS[num_used:].zero_()
        return _sum_of_pairs(rows_ND, plan).to(x_TD.dtype), kept_NS


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    kept_NS: Tensor,
    *,
    activation: str,
    dtype: torch.dtype,
    needs_x: bool,
    take: Callable[[int, Rows], None] | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x_TD, empty where it is not needed, and of weight_N.

    take: called with each expert that has rows, in whatever thread computed them, after the last use of its
    weights, so that it may change them; None: no gradient of the weights is wanted.

    The gradient of a gate's weight is the product of an expert's output with y's gradient. It equals that of
    the hidden layer with its gradient, so that no output need be kept.
    """
    act, num_rows, wide = (
        ACTIVATIONS[activation],
        len(plan.token_N),
        torch.promote_types(dtype, weight_N.dtype),
    )
    weight_N1 = weight_N[plan.order_N][:, None]
    grad_rows_ND = recycled_empty(*((num_rows, x_TD.shape[1]) if needs_x else (0,)), dtype=dtype)
    grad_weight_N = weight_N.new_zeros(num_rows, dtype=wide)

    scratch = Scratch()

    def compute(group: Group) -> None:
        rows, token_N = group.rows, plan.token_N[group.rows]
        w_in, w_out = (partial(scratch.cast, weight, dtype) for weight in (w_in_EDS, w_out_EHD))
        input_ND = x_TD.index_select(0, token_N).to(dtype)
        if len(kept_NS):
            kept = kept_NS[rows]
        else:
            kept = _products(input_ND, group, w_in)
            act.keep(kept, out=kept)
        hidden_NH, grad_ND = act.hidden(kept), grad_TD.index_select(0, token_N).to(dtype)
        grad_NH = _products(grad_ND, group, lambda expert: w_out(expert).t())
        torch.sum(grad_NH * hidden_NH, dim=1, dtype=wide, out=grad_weight_N[rows])
        grad_NS = act.gradient(grad_NH.mul_(weight_N1[rows]), kept)
        if needs_x:
            _products(grad_NS, group, lambda expert: w_in(expert).t(), out=grad_rows_ND[rows])
        if take is not None:
            parts = Rows(input_ND, grad_NS, hidden_NH, grad_ND.mul_(weight_N1[rows]))
            for expert, *of_expert in zip(
                group.experts, *(part.split(group.counts) for part in parts), strict=True
            ):
                take(expert, Rows(*of_expert))

    with autocast_off(x_TD.device), torch.no_grad():
        for_each(compute, _groups(plan, w_in_EDS))
        grad_x_TD = grad_rows_ND
        if needs_x:
            grad_rows_ND[int(plan.end_E[-1]) :].zero_()
            grad_x_TD = _sum_of_pairs(grad_rows_ND, plan)
        return grad_x_TD.to(x_TD.dtype), grad_weight_N[plan.row_N].to(weight_N.dtype)


def _groups(plan: Plan, w_in_EDS: Tensor) -> list[Group]:
    _, width, num_inputs = w_in_EDS.shape
    return groups_of(
        plan.end_E,
        most_rows=_ROW_NUMBERS_PER_GROUP // max(width, num_inputs, 1),
        most_experts=_WEIGHT_NUMBERS_PER_GROUP // max(width * num_inputs, 1),
    )


def _products(left_ND: Tensor, group: Group, matrix: Matrix, out: Tensor | None = None) -> Tensor:
    """Each expert's rows times its matrix, [N, H], in `out` where it is given."""
    if len(group.experts) == 1:
        (right_DH,) = map(matrix, group.experts)
        if out is None:
            return product(left_ND, right_DH)
        multiply(left_ND, right_DH, out=out)
        return out
    if out is None:
        out = left_ND.new_empty(len(left_ND), matrix(group.experts[0]).shape[1])
    for expert, left, part in zip(
        group.experts, left_ND.split(group.counts), out.split(group.counts), strict=True
    ):
        multiply(left, matrix(expert), out=part)
    return out


def _sum_of_pairs(rows_ND: Tensor, plan: Plan) -> Tensor:
    """Sum each token's rows in the order of its pairs; in float32 at least, rounded once."""
    if plan.pairs_per_token is not None:
        return F.embedding_bag(plan.row_N.view(-1, plan.pairs_per_token), rows_ND, mode="sum")
    return F.embedding_bag(plan.row_N, rows_ND, plan.pairs_T.cumsum(0) - plan.pairs_T, mode="sum")
