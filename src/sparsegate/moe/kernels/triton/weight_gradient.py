"""The gradient of stacked weights: each expert's rows on the left, transposed, times those on the right."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Shape, launch, shapes
from .tiles import in_groups, multiply_add


def weight_gradient(
    left: Tensor,
    right: Tensor,
    token_N: Tensor,
    first_row_E1: Tensor,
    experts: range,
    *,
    gather_left: bool,
) -> Tensor:
    """Sum over each expert's rows of left[row]^T right[row], each tile written once: [E, left, right].

    One of the two has a row for each token, gathered while it is loaded; the other stands in expert order.
    experts: those that follow each other whose gradients are wanted. Zeros for an expert without rows. In the
    operands' dtype.
    """
    num_experts = len(experts)
    out = left.new_empty(num_experts, left.shape[1], right.shape[1])
    if not token_N.shape[0] or not out.numel():
        return out.zero_()
    launch(
        _weight_gradient_kernel,
        _candidates(left, token_N.shape[0] / (first_row_E1.shape[0] - 1)),
        lambda shape: (
            num_experts * triton.cdiv(out.shape[1], shape.rows) * triton.cdiv(out.shape[2], shape.columns)
        ),
        left,
        right,
        out,
        token_N,
        first_row_E1[experts.start :],
        num_experts,
        *left.stride(),
        *right.stride(),
        left.shape[1],
        right.shape[1],
        cut={"rows": left.shape[1], "columns": right.shape[1]},
        GATHER_LEFT=gather_left,
    )
    return out


def _candidates(left: Tensor, mean_rows: float) -> list[Shape]:
    """Tiles as high as an expert's matrix lets them be; the inner dimension is its rows, which may be few."""
    candidates = shapes(left.dtype, max(16, min(128, triton.next_power_of_2(left.shape[1]))))
    inner = max(16, min(64, triton.next_power_of_2(int(mean_rows))))
    return list(dict.fromkeys(shape._replace(inner=min(shape.inner, inner)) for shape in candidates))


@triton.jit(do_not_specialize=["num_experts"])
def _weight_gradient_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    token_ptr,
    first_row_ptr,
    num_experts,
    left_stride_n,
    left_stride_d,
    right_stride_n,
    right_stride_d,
    left_size,
    right_size,
    GATHER_LEFT: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    num_rows = tl.cdiv(left_size, ROWS)
    num_columns = tl.cdiv(right_size, COLUMNS)
    tiles_of_expert = num_rows * num_columns
    for tile in range(tl.program_id(0), num_experts * tiles_of_expert, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        row_tile, column_tile = in_groups(tile % tiles_of_expert, num_rows, num_columns)
        left_columns = row_tile * ROWS + tl.arange(0, ROWS)
        right_columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        is_left = (left_columns < left_size) | WHOLE_ROWS
        is_right = (right_columns < right_size) | WHOLE_COLUMNS
        first_row = tl.load(first_row_ptr + expert)
        end_row = tl.load(first_row_ptr + expert + 1)
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        # One step ahead by hand: loads that wait for a load of their own step are not pipelined well. Past
        # the expert's end its last token is gathered again, and counts for nothing: the other side is 0.
        last_row = tl.maximum(end_row - 1, 0)
        next_rows = first_row + tl.arange(0, INNER)
        next_tokens = tl.load(token_ptr + tl.minimum(next_rows, last_row)).to(tl.int32)
        for _ in range(first_row, end_row, INNER):
            rows, tokens, is_row = next_rows.to(tl.int64), next_tokens.to(tl.int64), next_rows < end_row
            next_rows += INNER
            next_tokens = tl.load(token_ptr + tl.minimum(next_rows, last_row)).to(tl.int32)
            left = tl.load(
                left_ptr
                + (tokens if GATHER_LEFT else rows)[None, :] * left_stride_n
                + left_columns[:, None] * left_stride_d,
                mask=(is_row | GATHER_LEFT)[None, :] & is_left[:, None],
                other=0.0,
            )
            right = tl.load(
                right_ptr
                + (rows if GATHER_LEFT else tokens)[:, None] * right_stride_n
                + right_columns[None, :] * right_stride_d,
                mask=(is_row | (not GATHER_LEFT))[:, None] & is_right[None, :],
                other=0.0,
            )
            acc = multiply_add(left, right, acc, PRECISION)
        out_rows_ptr = out_ptr + (expert.to(tl.int64) * left_size + left_columns)[:, None] * right_size
        tl.store(out_rows_ptr + right_columns[None, :], acc, mask=is_left[:, None] & is_right[None, :])
