"""The grouped product as one operator: autograd to any order, autocast, fake tensors, no graph break.

`F.grouped_mm` cannot be called directly: its fake kernel refuses all but bfloat16 on torch 2.11 to 2.13, it
has no float64, and its backward fails on expanded gradients. Here each expert's rows go through an `mm` into
place for each weight, which on a CPU is also the faster way; on a GPU it is Triton's, where it is asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..precision import as_autocast
from .groups import Group, for_each, groups_of, without_rows
from .memory import recycled_empty


def grouped_product(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor, *, kernel: str = "loop") -> Tensor:
    """Multiply each expert's rows by its matrix: out[r] = rows[r] @ weight[e] for the rows r of expert e.

    rows_ND: in expert order. weight_EDH: one matrix per expert, of the rows' dtype unless autocast is on.
    end_E: int64, one past each expert's last row. kernel: of `choice.grouped_kernel`. Returns [N, H]; zeros
    for the rows past the last end.
    """
    nothing_EDC = weight_EDH.new_empty(*weight_EDH.shape[:2], 0)
    return grouped_products(rows_ND, weight_EDH, nothing_EDC, end_E, kernel=kernel)


def grouped_products(
    rows_ND: Tensor, left_EDB: Tensor, right_EDC: Tensor, end_E: Tensor, *, kernel: str = "loop"
) -> Tensor:
    """The grouped products with two weights, side by side, [N, B + C]: neither is copied for it."""
    tensors = as_autocast(rows_ND), as_autocast(left_EDB), as_autocast(right_EDC)
    return _product(*tensors, end_E, False, kernel)


@torch.library.custom_op("sparsegate::grouped_product", mutates_args=())
def _product(
    rows_NS: Tensor, left_EDB: Tensor, right_EDC: Tensor, end_E: Tensor, transposed: bool, kernel: str
) -> Tensor:
    """transposed: from rows of B + C numbers to D, the sum of the products with each weight's transpose."""
    weights = _with_columns(left_EDB, right_EDC)
    if kernel == "triton":
        from .triton import grouped  # triton is no dependency: imported by who chose it

        return grouped.product(rows_NS, weights, end_E, transposed=transposed)
    width = left_EDB.shape[1] if transposed else left_EDB.shape[2] + right_EDC.shape[2]
    out_NS = _empty(rows_NS, rows_NS.shape[0], width)

    def compute(expert: int, rows: slice) -> None:
        some_NS, out = rows_NS[rows], out_NS[rows]
        for index, (weight_EDH, columns) in enumerate(weights):
            if not transposed:
                torch.mm(some_NS, weight_EDH[expert], out=out[:, columns])
            elif index == 0:
                torch.mm(some_NS[:, columns], weight_EDH[expert].t(), out=out)
            else:
                out.addmm_(some_NS[:, columns], weight_EDH[expert].t())

    _for_each(compute, rows_NS, end_E)
    out_NS[int(end_E[-1]) :].zero_()
    return out_NS


@torch.library.custom_op("sparsegate::grouped_outer", mutates_args=())
def _outer(
    rows_ND: Tensor, grad_NS: Tensor, end_E: Tensor, num_left: int, kernel: str
) -> tuple[Tensor, Tensor]:
    """Products over each expert's rows, the gradients of both weights: rows[of e]^T @ grad[of e].

    num_left: the columns of the left one.
    """
    num_experts, width, num_right = end_E.shape[0], rows_ND.shape[1], grad_NS.shape[1] - num_left
    if kernel == "triton":
        from .triton import grouped

        both = [slice(num_left), slice(num_left, num_left + num_right)]
        left_EDB, right_EDC = grouped.outer(rows_ND, grad_NS, end_E, columns=both)
        return left_EDB, right_EDC
    left_EDB, right_EDC = (
        _empty(rows_ND, num_experts, width, num_columns) for num_columns in (num_left, num_right)
    )
    results = _with_columns(left_EDB, right_EDC)

    def compute(expert: int, rows: slice) -> None:
        rows_DN, some_NS = rows_ND[rows].t(), grad_NS[rows]
        for out_EDH, columns in results:
            torch.mm(rows_DN, some_NS[:, columns], out=out_EDH[expert])

    _for_each(compute, rows_ND, end_E)
    for expert in without_rows(end_E):
        for out_EDH, _ in results:
            out_EDH[expert].zero_()
    return left_EDB, right_EDC


def _with_columns(left_EDB: Tensor, right_EDC: Tensor) -> list[tuple[Tensor, slice]]:
    """Those of the two that have columns, one at least, and where these stand beside one another."""
    num_left, num_right = left_EDB.shape[2], right_EDC.shape[2]
    both = [(left_EDB, slice(num_left)), (right_EDC, slice(num_left, num_left + num_right))]
    return [one for one in both if one[0].shape[2]] or both[:1]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return recycled_empty(*shape, dtype=like.dtype) if like.is_cpu else like.new_empty(shape)


def _for_each(compute: Callable[[int, slice], None], rows_ND: Tensor, end_E: Tensor) -> None:
    """On a CPU with all threads; on a GPU one product after the other, which waits for the counts."""
    groups = groups_of(end_E)

    def compute_group(group: Group) -> None:
        (expert,) = group.experts
        compute(expert, group.rows)

    if rows_ND.is_cpu:
        for_each(compute_group, groups)
    else:
        for group in groups:
            compute_group(group)


@_product.register_fake
def _(
    rows_NS: Tensor, left_EDB: Tensor, right_EDC: Tensor, end_E: Tensor, transposed: bool, kernel: str
) -> Tensor:
    width = left_EDB.shape[1] if transposed else left_EDB.shape[2] + right_EDC.shape[2]
    return rows_NS.new_empty(rows_NS.shape[0], width)


@_outer.register_fake
def _(rows_ND: Tensor, grad_NS: Tensor, end_E: Tensor, num_left: int, kernel: str) -> tuple[Tensor, Tensor]:
    num_experts, width, num_right = end_E.shape[0], rows_ND.shape[1], grad_NS.shape[1] - num_left
    return rows_ND.new_empty(num_experts, width, num_left), rows_ND.new_empty(num_experts, width, num_right)


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _product_backward(ctx: Any, grad_NS: Tensor) -> tuple[Tensor | None, ...]:
    rows_NS, left_EDB, right_EDC, end_E = ctx.saved_tensors
    needs_rows, needs_left, needs_right, *_ = ctx.needs_input_grad
    grad_rows_NS = grad_left_EDB = grad_right_EDC = None
    if needs_rows:
        grad_rows_NS = _product(grad_NS, left_EDB, right_EDC, end_E, not ctx.transposed, ctx.kernel)
    if needs_left or needs_right:
        narrow_ND, wide_NS = (grad_NS, rows_NS) if ctx.transposed else (rows_NS, grad_NS)
        num_left, num_right = left_EDB.shape[2] * needs_left, right_EDC.shape[2] * needs_right
        needed_NS = wide_NS.narrow(1, left_EDB.shape[2] - num_left, num_left + num_right)
        grad_left_EDB, grad_right_EDC = _outer(narrow_ND, needed_NS, end_E, num_left, ctx.kernel)
    return (
        grad_rows_NS,
        grad_left_EDB if needs_left else None,
        grad_right_EDC if needs_right else None,
        None,
        None,
        None,
    )


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _outer_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    rows_ND, grad_NS, end_E = ctx.saved_tensors
    of_rows_ND = _product(grad_NS, *grads, end_E, True, ctx.kernel) if ctx.needs_input_grad[0] else None
    of_grad_NS = _product(rows_ND, *grads, end_E, False, ctx.kernel) if ctx.needs_input_grad[1] else None
    return of_rows_ND, of_grad_NS, None, None, None


_product.register_autograd(_product_backward, setup_context=_save_product)
_outer.register_autograd(_outer_backward, setup_context=_save_outer)
