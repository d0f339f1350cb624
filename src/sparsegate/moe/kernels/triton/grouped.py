"""The products of `kernels/grouped.py` on a GPU, which wait for no count."""

import torch
from torch import Tensor

from .rows import product_rows
from .schedule import make_schedule
from .weight_gradient import weight_gradient


def product(
    rows_NS: Tensor, weights: list[tuple[Tensor, slice]], end_E: Tensor, *, transposed: bool
) -> Tensor:
    """Each expert's rows times its matrices side by side, or the sum of the products with their transposes.

    weights: each with its columns among the rows' or the result's. Zeros for the rows past the last end.
    """
    schedule = make_schedule(end_E, rows_NS.shape[0])
    if transposed:
        parts = [
            product_rows(rows_NS[:, columns].contiguous(), weight_EDH.transpose(1, 2), schedule)
            for weight_EDH, columns in weights
        ]
        out_NS = torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
    else:
        left_ND = rows_NS.contiguous()
        out_NS = torch.cat([product_rows(left_ND, weight_EDH, schedule) for weight_EDH, _ in weights], dim=1)
    row_N = torch.arange(out_NS.shape[0], device=out_NS.device)
    return out_NS.masked_fill_((row_N >= end_E[-1])[:, None], 0.0)


def outer(rows_ND: Tensor, grad_NS: Tensor, end_E: Tensor, *, columns: list[slice]) -> list[Tensor]:
    """The gradients of weights: rows[of each expert]^T @ grad[of it, columns]."""
    row_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
    first_row_E1 = make_schedule(end_E, rows_ND.shape[0]).first_row_E1
    all_experts = range(end_E.shape[0])
    return [
        weight_gradient(rows_ND, grad_NS[:, some], row_N, first_row_E1, all_experts, gather_left=True)
        for some in columns
    ]
