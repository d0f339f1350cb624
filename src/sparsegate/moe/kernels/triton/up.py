"""The first product: tokens are gathered on load, the activation is applied while storing."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Shape, launch, shapes
from .schedule import Schedule, most_tiles, rows_of_a_tile
from .tiles import locate, multiply_add, product, sigmoid


def hidden_rows(
    x_TD: Tensor, w_in_EDS: Tensor, token_N: Tensor, schedule: Schedule, *, gated: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Rows in expert order of the hidden layer, and of what backward needs to know of it.

    Returns hidden_NH, and of SwiGLU where `keep` is set pre_NS, the values before the activation; a ReLU's
    are known from its output. Rows past the last expert's are left as they are.
    """
    num_experts, width, columns = w_in_EDS.shape
    hidden, num_rows = columns // 2 if gated else columns, token_N.shape[0]
    hidden_NH = x_TD.new_empty(num_rows, hidden)
    pre_NS = x_TD.new_empty(num_rows if gated and keep else 0, columns)
    rows = rows_of_a_tile(num_rows, num_experts)
    candidates = shapes(x_TD.dtype, rows)
    if gated:
        # Two accumulators: as many registers and loads as one of twice the width.
        candidates = [shape._replace(columns=max(16, shape.columns // 2)) for shape in candidates]

    def num_tiles(shape: Shape) -> int:
        return most_tiles(num_rows, num_experts, rows) * triton.cdiv(hidden, shape.columns)

    if num_rows:
        launch(
            _up_kernel,
            candidates,
            num_tiles,
            x_TD,
            w_in_EDS,
            hidden_NH,
            pre_NS,
            token_N,
            *schedule,
            num_experts,
            *x_TD.stride(),
            *w_in_EDS.stride(),
            width,
            hidden,
            cut={"inner": width, "columns": hidden},
            GATED=gated,
            KEEP=gated and keep,
        )
    return hidden_NH, pre_NS


@triton.jit(do_not_specialize=["num_experts"])
def _up_kernel(
    x_ptr,
    weight_ptr,
    hidden_ptr,
    pre_ptr,
    token_ptr,
    expert_of_tile_ptr,
    first_tile_ptr,
    first_row_ptr,
    num_experts,
    x_stride_t,
    x_stride_d,
    weight_stride_e,
    weight_stride_d,
    weight_stride_s,
    width,
    hidden_size,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE_INNER: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    num_columns = tl.cdiv(hidden_size, COLUMNS)
    num_tiles = tl.load(first_tile_ptr + num_experts) * num_columns
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert, row, end_row, column_tile = locate(
            tile, expert_of_tile_ptr, first_tile_ptr, first_row_ptr, num_columns, ROWS
        )
        rows = row + tl.arange(0, ROWS)
        # Past the expert's end its last row is read again: what is loaded is then never masked nor foreign.
        token = tl.load(token_ptr + tl.minimum(rows, end_row - 1))
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        is_column = (columns < hidden_size) | WHOLE_COLUMNS
        x_rows_ptr = x_ptr + token * x_stride_t
        columns_ptr = weight_ptr + expert * weight_stride_e + columns * weight_stride_s
        place = rows.to(tl.int64)[:, None]
        is_place = (rows < end_row)[:, None] & is_column[None, :]
        if GATED:
            gate, up = _paired_products(
                x_rows_ptr,
                x_stride_d,
                columns_ptr,
                columns_ptr + hidden_size * weight_stride_s,
                weight_stride_d,
                is_column,
                width,
                WHOLE_INNER,
                INNER,
                PRECISION,
            )
            if KEEP:
                pre_place_ptr = pre_ptr + place * (2 * hidden_size) + columns[None, :]
                tl.store(pre_place_ptr, gate, mask=is_place)
                tl.store(pre_place_ptr + hidden_size, up, mask=is_place)
            hidden = gate * sigmoid(gate) * up
        else:
            acc = product(
                x_rows_ptr,
                x_stride_d,
                columns_ptr,
                weight_stride_d,
                is_column,
                width,
                WHOLE_INNER,
                INNER,
                PRECISION,
            )
            hidden = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(hidden_ptr + place * hidden_size + columns[None, :], hidden, mask=is_place)


@triton.jit
def _paired_products(
    left_ptr,
    left_stride,
    gate_ptr,
    up_ptr,
    weight_stride,
    is_column,
    depth,
    WHOLE_INNER: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`product` with two matrices at a time, so that the rows are gathered once."""
    gate_acc = tl.zeros((left_ptr.shape[0], gate_ptr.shape[0]), dtype=tl.float32)
    up_acc = tl.zeros((left_ptr.shape[0], gate_ptr.shape[0]), dtype=tl.float32)
    for start in range(0, depth, INNER):
        inner = start + tl.arange(0, INNER)
        is_inner = (inner < depth) | WHOLE_INNER
        left = tl.load(left_ptr[:, None] + inner[None, :] * left_stride, mask=is_inner[None, :], other=0.0)
        offset = inner[:, None] * weight_stride
        is_weight = is_inner[:, None] & is_column[None, :]
        gate = tl.load(gate_ptr[None, :] + offset, mask=is_weight, other=0.0)
        up = tl.load(up_ptr[None, :] + offset, mask=is_weight, other=0.0)
        gate_acc = multiply_add(left, gate, gate_acc, PRECISION)
        up_acc = multiply_add(left, up, up_acc, PRECISION)
    return gate_acc, up_acc
