"""The gradient of stacked weights: each expert's rows on the left, transposed, times those on the right."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Shape, launch, shapes
from .tiles import in_groups, multiply_add


def weight_gradient(
    left: Tensor, right: Tensor, token_N: Tensor, first_row_E1: Tensor, *, gather_left: bool
) -> Tensor:
    """Sum over each expert's rows of left[row]^T right[row], each tile written once: [E, left, right].

    One of the two has a row for each token, gathered while it is loaded; the other stands in expert order.
    Zeros for an expert without rows. In the operands' dtype.
    """
    num_experts = first_row_E1.shape[0] - 1
    out = left.new_empty(num_experts, left.shape[1], right.shape[1])
    if not out.numel():
        return out
    launch(
        _weight_gradient_kernel,
        _candidates(left, token_N.shape[0] / num_experts),
        lambda shape: (
            num_experts * triton.cdiv(out.shape[1], shape.rows) * triton.cdiv(out.shape[2], shape.columns)
        ),
        left,
        right,
        out,
        token_N,
        first_row_E1,
        num_experts,
        *left.stride(),
        *right.stride(),
        LEFT=left.shape[1],
        RIGHT=right.shape[1],
        GATHER_LEFT=gather_left,
    )
    return out


def _candidates(left: Tensor, mean_rows: float) -> list[Shape]:
    """Tiles as high as an expert's matrix lets them be; the inner dimension is its rows, which may be few."""
    candidates = shapes(left.dtype, max(16, min(128, triton.next_power_of_2(left.shape[1]))))
    inner = max(16, min(64, triton.next_power_of_2(int(mean_rows))))
    return list(dict.fromkeys(shape._replace(inner=min(shape.inner, inner)) for shape in candidates))


@triton.jit
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
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    num_rows = tl.cdiv(LEFT, ROWS)
    num_columns = tl.cdiv(RIGHT, COLUMNS)
    tiles_of_expert = num_rows * num_columns
    for tile in range(tl.program_id(0), num_experts * tiles_of_expert, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        row_tile, column_tile = in_groups(tile % tiles_of_expert, num_rows, num_columns)
        left_columns = row_tile * ROWS + tl.arange(0, ROWS)
        right_columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        is_left = (left_columns < LEFT) | (LEFT % ROWS == 0)
        is_right = (right_columns < RIGHT) | (RIGHT % COLUMNS == 0)
        first_row = tl.load(first_row_ptr + expert)
        end_row = tl.load(first_row_ptr + expert + 1)
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        # One step ahead by hand: loads that wait for a load of their own step are not pipelined well.
        next_rows = first_row + tl.arange(0, INNER)
        next_tokens = tl.load(token_ptr + next_rows, mask=next_rows < end_row, other=0)
        for _ in range(first_row, end_row, INNER):
            rows, tokens, is_row = next_rows, next_tokens, next_rows < end_row
            next_rows += INNER
            next_tokens = tl.load(token_ptr + next_rows, mask=next_rows < end_row, other=0)
            left_rows = tokens if GATHER_LEFT else rows.to(tl.int64)
            right_rows = rows.to(tl.int64) if GATHER_LEFT else tokens
            left = tl.load(
                left_ptr + left_rows[None, :] * left_stride_n + left_columns[:, None] * left_stride_d,
                mask=is_row[None, :] & is_left[:, None],
                other=0.0,
            )
            right = tl.load(
                right_ptr + right_rows[:, None] * right_stride_n + right_columns[None, :] * right_stride_d,
                mask=is_row[:, None] & is_right[None, :],
                other=0.0,
            )
            acc = multiply_add(left, right, acc, PRECISION)
        place = (expert.to(tl.int64) * LEFT + left_columns[:, None]) * RIGHT + right_columns[None, :]
        tl.store(out_ptr + place, acc, mask=is_left[:, None] & is_right[None, :])
