"""The grouped product as one operator: autograd to any order, autocast, fake tensors, no graph break.

`F.grouped_mm` cannot be called directly: its fake kernel refuses all but bfloat16 on torch 2.11 to 2.13, it
has no float64, and its backward fails on expanded gradients. Here each expert's rows go through one `mm` into
place, which on a CPU is also the faster of the two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..precision import as_autocast
from .groups import Group, for_each, groups_of, without_rows
from .memory import recycled_empty


def grouped_product(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix: out[r] = rows[r] @ weight[e] for the rows r of expert e.

    rows_ND: in expert order. weight_EDH: one matrix per expert, of the rows' dtype unless autocast is on.
    end_E: int64, one past each expert's last row. Returns [N, H]; zeros for the rows past the last end.
    """
    return _product(as_autocast(rows_ND), as_autocast(weight_EDH), end_E)


@torch.library.custom_op("sparsegate::grouped_product", mutates_args=())
def _product(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    out_NH = _empty(rows_ND, rows_ND.shape[0], weight_EDH.shape[2])

    def compute(group: Group) -> None:
        torch.mm(rows_ND[group.rows], weight_EDH[group.expert], out=out_NH[group.rows])

    _for_each(compute, rows_ND, end_E)
    out_NH[int(end_E[-1]) :].zero_()
    return out_NH


@torch.library.custom_op("sparsegate::grouped_outer", mutates_args=())
def _outer(left_ND: Tensor, right_NH: Tensor, end_E: Tensor) -> Tensor:
    """Products over each expert's rows, the gradient of a weight: left[rows of e]^T @ right[rows of e]."""
    out_EDH = _empty(left_ND, end_E.shape[0], left_ND.shape[1], right_NH.shape[1])

    def compute(group: Group) -> None:
        torch.mm(left_ND[group.rows].T, right_NH[group.rows], out=out_EDH[group.expert])

    _for_each(compute, left_ND, end_E)
    for expert in without_rows(end_E):
        out_EDH[expert].zero_()
    return out_EDH


def _empty(like: Tensor, *shape: int) -> Tensor:
    return recycled_empty(*shape, dtype=like.dtype) if like.is_cpu else like.new_empty(shape)


def _for_each(compute: Callable[[Group], None], rows_ND: Tensor, end_E: Tensor) -> None:
    """On a CPU with all threads; on a GPU one product after the other, which waits for the counts."""
    groups = groups_of(end_E)
    if rows_ND.is_cpu:
        for_each(compute, groups)
    else:
        for group in groups:
            compute(group)


@_product.register_fake
def _(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    return rows_ND.new_empty(rows_ND.shape[0], weight_EDH.shape[2])


@_outer.register_fake
def _(left_ND: Tensor, right_NH: Tensor, end_E: Tensor) -> Tensor:
    return left_ND.new_empty(end_E.shape[0], left_ND.shape[1], right_NH.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
    rows_ND, weight_EDH, end_E = ctx.saved_tensors
    grad_rows_ND = _product(grad_NH, weight_EDH.transpose(1, 2), end_E) if ctx.needs_input_grad[0] else None
    grad_weight_EDH = _outer(rows_ND, grad_NH, end_E) if ctx.needs_input_grad[1] else None
    return grad_rows_ND, grad_weight_EDH, None


def _outer_backward(ctx: Any, grad_EDH: Tensor) -> tuple[Tensor | None, ...]:
    left_ND, right_NH, end_E = ctx.saved_tensors
    grad_left_ND = _product(right_NH, grad_EDH.transpose(1, 2), end_E) if ctx.needs_input_grad[0] else None
    grad_right_NH = _product(left_ND, grad_EDH, end_E) if ctx.needs_input_grad[1] else None
    return grad_left_ND, grad_right_NH, None


_product.register_autograd(_product_backward, setup_context=_save_inputs)
_outer.register_autograd(_outer_backward, setup_context=_save_inputs)
