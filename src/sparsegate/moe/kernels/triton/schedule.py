"""Which rows of which expert each tile of a product covers, found on the device without waiting for it.

A product of T * K rows is cut into row tiles that never cross from one expert to the next. How many there are
depends on the counts, which the host does not know: buffers have the size of the bound, and the kernels read
the number from `first_tile_E1[-1]`.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

# Rows of a tile by mean rows of an expert: the least mean for each. An expert's rows should mostly fit into
# one tile while they are few, because then its weights are what is read; a tensor core works on 64 rows at
# least (16 before Hopper), and needs 128 to be fed from cache.
_LEAST_MEAN = {128: 96, 64: 32, 32: 16}
_FEWEST_ROWS = 16


class Schedule(NamedTuple):
    """The row tiles of all experts, all int32. Tiles of an expert are adjacent, experts in order.

    expert_of_tile: expert of each tile; `num_experts` past the last one in use. first_tile_E1, first_row_E1:
    the first tile and the first row of each expert, and at the end the number of tiles and of rows in use.
    """

    expert_of_tile: Tensor
    first_tile_E1: Tensor
    first_row_E1: Tensor


def rows_of_a_tile(num_rows: int, num_experts: int) -> int:
    """Height of the row tiles: 16, 32, 64 or 128, from shapes alone."""
    mean = num_rows / num_experts
    return next((rows for rows, least in _LEAST_MEAN.items() if mean >= least), _FEWEST_ROWS)


def most_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """Upper bound of the number of tiles: each expert that has rows may have one that is not full."""
    return -(-num_rows // rows) + min(num_rows, num_experts)


def make_schedule(end_E: Tensor, num_rows: int) -> Schedule:
    """Cut the rows of each expert into tiles of `rows_of_a_tile`. end_E: one past each expert's last row."""
    return Schedule(*_make_schedule(end_E, num_rows))


@torch.library.custom_op("sparsegate::triton_schedule", mutates_args=())
def _make_schedule(end_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_of_a_tile(num_rows, end_E.shape[0])
    first_row_E1 = pad(end_E, (1, 0)).to(torch.int32)
    tiles_E = (first_row_E1.diff() + (rows - 1)) // rows
    first_tile_E1 = pad(tiles_E.cumsum(0, dtype=torch.int32), (1, 0))
    # Not of `most_tiles` for these rows: the size would then tell compiled graphs which height was chosen.
    tile = torch.arange(_size(num_rows, end_E.shape[0]), dtype=torch.int32, device=end_E.device)
    expert_of_tile = torch.searchsorted(first_tile_E1[1:], tile, right=True, out_int32=True)
    return expert_of_tile, first_tile_E1, first_row_E1


@_make_schedule.register_fake
def _(end_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    num_experts = end_E.shape[0]
    expert_of_tile = end_E.new_empty(_size(num_rows, num_experts), dtype=torch.int32)
    first_E1 = end_E.new_empty(num_experts + 1, dtype=torch.int32)
    return expert_of_tile, first_E1, torch.empty_like(first_E1)


def _size(num_rows: int, num_experts: int) -> int:
    """The bound for the lowest tiles, which holds for all."""
    full = (num_rows + _FEWEST_ROWS - 1) // _FEWEST_ROWS
    # `sym_min` gives what it is given, though annotated as float.
    return full + cast(int, torch.sym_min(num_rows, num_experts))
