"""The gradient at the hidden layer: y's gradient is gathered on load, the rest happens while storing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Shape, launch, shapes
from .schedule import Schedule, most_tiles, rows_of_a_tile
from .tiles import locate, product, quarters, sigmoid


def hidden_gradient(
    grad_y_TD: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    kept: Tensor,
    order_N: Tensor,
    token_N: Tensor,
    schedule: Schedule,
    *,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what the first product gave and of the gate's weights, and the weighted hidden rows.

    weight_N, grad_weight_N: in the order of the pairs. kept: what `hidden_rows` gave for this, hidden_NH of
    ReLU and pre_NS of SwiGLU. Returns grad_pre_NS, weighted_NH (each hidden row times its gate's weight: the
    left operand of w_out's gradient) and grad_weight_N = <h, dy W_out^T>, which takes no row of y; zero for
    unused pairs. Rows past the last expert's are left as they are.
    """
    num_experts, hidden, width = w_out_EHD.shape
    num_rows = order_N.shape[0]
    grad_pre_NS, weighted_NH = torch.empty_like(kept), kept.new_empty(num_rows, hidden)
    rows = rows_of_a_tile(num_rows, num_experts)
    candidates = shapes(grad_y_TD.dtype, rows)
    # A column of partial products for each tile: summed in order, where atomics would be in any.
    most_columns = triton.cdiv(hidden, min(shape.columns for shape in candidates))
    partial_NC = weight_N.new_zeros(num_rows, most_columns)

    def num_tiles(shape: Shape) -> int:
        return most_tiles(num_rows, num_experts, rows) * triton.cdiv(hidden, shape.columns)

    if num_rows:
        launch(
            _hidden_gradient_kernel,
            candidates,
            num_tiles,
            grad_y_TD,
            w_out_EHD,
            weight_N,
            kept,
            grad_pre_NS,
            weighted_NH,
            partial_NC,
            order_N,
            token_N,
            *schedule,
            num_experts,
            most_columns,
            *grad_y_TD.stride(),
            *w_out_EHD.stride(),
            width,
            hidden,
            cut={"inner": width, "columns": hidden},
            GATED=gated,
        )
    return grad_pre_NS, weighted_NH, partial_NC.sum(dim=1)


@triton.jit(do_not_specialize=["num_experts", "most_columns"])
def _hidden_gradient_kernel(
    grad_y_ptr,
    weight_ptr,
    gate_weight_ptr,
    kept_ptr,
    grad_pre_ptr,
    weighted_ptr,
    partial_ptr,
    order_ptr,
    token_ptr,
    expert_of_tile_ptr,
    first_tile_ptr,
    first_row_ptr,
    num_experts,
    most_columns,
    grad_y_stride_t,
    grad_y_stride_d,
    weight_stride_e,
    weight_stride_h,
    weight_stride_d,
    width,
    hidden_size,
    GATED: tl.constexpr,
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
        is_row = rows < end_row
        read_rows = tl.minimum(rows, end_row - 1)
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        is_column = (columns < hidden_size) | WHOLE_COLUMNS
        grad_hidden = product(
            grad_y_ptr + tl.load(token_ptr + read_rows) * grad_y_stride_t,
            grad_y_stride_d,
            weight_ptr + expert * weight_stride_e + columns * weight_stride_h,
            weight_stride_d,
            is_column,
            width,
            WHOLE_INNER,
            INNER,
            PRECISION,
        )
        pair = tl.load(order_ptr + read_rows)
        gate_weight = tl.load(gate_weight_ptr + pair)
        partial = tl.zeros((ROWS,), dtype=tl.float32)
        # In parts, because a whole tile of each operand is more than the registers hold.
        parts = quarters(grad_hidden)
        for nth in tl.static_range(4):
            partial += _store_gradients(
                parts[nth],
                gate_weight,
                kept_ptr,
                grad_pre_ptr,
                weighted_ptr,
                rows,
                is_row,
                column_tile * COLUMNS + nth * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4),
                hidden_size,
                GATED,
                WHOLE_COLUMNS,
            )
        tl.store(partial_ptr + pair * most_columns + column_tile, partial, mask=is_row)


@triton.jit
def _store_gradients(
    grad_hidden,
    gate_weight,
    kept_ptr,
    grad_pre_ptr,
    weighted_ptr,
    rows,
    is_row,
    columns,
    hidden_size,
    GATED: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
):
    """Store what follows from the gradient of some columns; returns its products with the hidden rows."""
    gate_weight = gate_weight[:, None]
    place = rows.to(tl.int64)[:, None]
    is_place = is_row[:, None] & ((columns < hidden_size) | WHOLE_COLUMNS)[None, :]
    hidden_place = place * hidden_size + columns[None, :]
    if GATED:
        pre_place = place * (2 * hidden_size) + columns[None, :]
        gate = tl.load(kept_ptr + pre_place, mask=is_place, other=0.0).to(tl.float32)
        up = tl.load(kept_ptr + pre_place + hidden_size, mask=is_place, other=0.0).to(tl.float32)
        part = sigmoid(gate)
        silu = gate * part
        hidden = silu * up
        grad_pre = gate_weight * grad_hidden
        tl.store(grad_pre_ptr + pre_place, grad_pre * up * (part + silu * (1.0 - part)), mask=is_place)
        tl.store(grad_pre_ptr + pre_place + hidden_size, grad_pre * silu, mask=is_place)
    else:
        hidden = tl.load(kept_ptr + hidden_place, mask=is_place, other=0.0).to(tl.float32)
        grad_pre = tl.where(hidden <= 0.0, 0.0, gate_weight * grad_hidden)
        tl.store(grad_pre_ptr + hidden_place, grad_pre, mask=is_place)
    tl.store(weighted_ptr + hidden_place, gate_weight * hidden, mask=is_place)
    return tl.sum(grad_hidden * hidden, axis=1)
