"""Rows in expert order times their expert's matrix: the second product, and the first's input gradient."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Shape, launch, shapes
from .schedule import Schedule, most_tiles, rows_of_a_tile
from .tiles import locate, product


def product_rows(left_NS: Tensor, weight_ESD: Tensor, schedule: Schedule) -> Tensor:
    """Multiply each expert's rows by its matrix, of any strides; rows past the last expert's are left."""
    num_rows, (num_experts, depth, width) = left_NS.shape[0], weight_ESD.shape
    out_ND = left_NS.new_empty(num_rows, width)
    rows = rows_of_a_tile(num_rows, num_experts)

    def num_tiles(shape: Shape) -> int:
        return most_tiles(num_rows, num_experts, rows) * triton.cdiv(width, shape.columns)

    if num_rows:
        launch(
            _rows_kernel,
            shapes(left_NS.dtype, rows),
            num_tiles,
            left_NS,
            weight_ESD,
            out_ND,
            *schedule,
            num_experts,
            *weight_ESD.stride(),
            depth,
            width,
            cut={"inner": depth, "columns": width},
            # Of the strides one is 1; which it is makes another kernel, with another fastest shape.
            TRANSPOSED=weight_ESD.stride(1) == 1,
        )
    return out_ND


@triton.jit(do_not_specialize=["num_experts"])
def _rows_kernel(
    left_ptr,
    weight_ptr,
    out_ptr,
    expert_of_tile_ptr,
    first_tile_ptr,
    first_row_ptr,
    num_experts,
    weight_stride_e,
    weight_stride_s,
    weight_stride_d,
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    WHOLE_INNER: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    num_columns = tl.cdiv(width, COLUMNS)
    num_tiles = tl.load(first_tile_ptr + num_experts) * num_columns
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, row, end_row, column_tile = locate(
            tile, expert_of_tile_ptr, first_tile_ptr, first_row_ptr, num_columns, ROWS
        )
        rows = row + tl.arange(0, ROWS)
        left_rows = tl.minimum(rows, end_row - 1).to(tl.int64)
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        is_column = (columns < width) | WHOLE_COLUMNS
        acc = product(
            left_ptr + left_rows * depth,
            1,
            weight_ptr + expert * weight_stride_e + columns * weight_stride_d,
            weight_stride_s,
            is_column,
            depth,
            WHOLE_INNER,
            INNER,
            PRECISION,
        )
        is_place = (rows < end_row)[:, None] & is_column[None, :]
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], acc, mask=is_place)
