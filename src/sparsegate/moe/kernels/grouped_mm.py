"""torch's own grouped product, which on a GPU takes all experts in one launch.

`F.grouped_mm` lacks what decision 0001 lists; here it is one operator with a fake kernel and autograd, whose
backward makes gradients contiguous. Its limits stay: `choice.py` knows them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import as_autocast


def grouped_mm_product(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    """out[r] = rows[r] @ weight[e] for the rows r of expert e, as `grouped.grouped_product` does."""
    return _product(as_autocast(rows_ND), as_autocast(weight_EDH), end_E)


@torch.library.custom_op("sparsegate::grouped_mm", mutates_args=())
def _product(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    out_NH = F.grouped_mm(rows_ND, weight_EDH, offs=end_E.to(torch.int32))
    return out_NH.masked_fill_(_past_the_end_N1(out_NH, end_E), 0)


@torch.library.custom_op("sparsegate::grouped_mm_outer", mutates_args=())
def _outer(left_ND: Tensor, right_NH: Tensor, end_E: Tensor) -> Tensor:
    """left[rows of e]^T @ right[rows of e] for each expert; zeros for one without rows."""
    out_EDH = F.grouped_mm(left_ND.t(), right_NH, offs=end_E.to(torch.int32))
    is_empty_E = end_E.diff(prepend=end_E.new_zeros(1)) == 0
    return out_EDH.masked_fill_(is_empty_E[:, None, None], 0)


def _past_the_end_N1(rows_ND: Tensor, end_E: Tensor) -> Tensor:
    return (torch.arange(rows_ND.shape[0], device=rows_ND.device) >= end_E[-1])[:, None]


@_product.register_fake
def _(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    return rows_ND.new_empty(rows_ND.shape[0], weight_EDH.shape[2])


@_outer.register_fake
def _(left_ND: Tensor, right_NH: Tensor, end_E: Tensor) -> Tensor:
    return left_ND.new_empty(end_E.shape[0], left_ND.shape[1], right_NH.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
    rows_ND, weight_EDH, end_E = ctx.saved_tensors
    grad_NH = grad_NH.contiguous()
    grad_rows_ND = _product(grad_NH, weight_EDH.transpose(1, 2), end_E) if ctx.needs_input_grad[0] else None
    grad_weight_EDH = _outer(rows_ND, grad_NH, end_E) if ctx.needs_input_grad[1] else None
    return grad_rows_ND, grad_weight_EDH, None


_product.register_autograd(_backward, setup_context=_setup_context)
