"""The sum of each token's rows: the combine of the forward pass, and in backward the gather's transpose."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .schedule import Schedule

_ELEMENTS = 4096  # of a program: 32 for each of its threads
_COLUMNS = 1024


def sum_of_rows(
    rows_ND: Tensor,
    weight_N: Tensor | None,
    row_N: Tensor,
    pairs_T: Tensor,
    schedule: Schedule,
    *,
    pairs_per_token: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Sum the rows of each token's pairs, times their weights if any, in float32: y_TD of that dtype.

    In the order of the pairs, so that the result is the same each time. Rows past the last expert's do not
    count, whatever is in them.
    """
    num_tokens, width = pairs_T.shape[0], rows_ND.shape[1]
    y_TD = rows_ND.new_empty(num_tokens, width, dtype=dtype)
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    tokens = min(_ELEMENTS // columns, 16)
    if num_tokens:
        _gather_sum_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(width, columns))](
            rows_ND,
            row_N if weight_N is None else weight_N,
            row_N,
            pad(pairs_T.cumsum(0), (1, 0)) if pairs_per_token is None else pairs_T,
            schedule.first_row_E1[-1:],
            y_TD,
            num_tokens,
            width,
            WEIGHTED=weight_N is not None,
            PAIRS=pairs_per_token,
            WHOLE_COLUMNS=width % columns == 0,
            TOKENS=tokens,
            COLUMNS=columns,
        )
    return y_TD


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_sum_kernel(
    rows_ptr,
    weight_ptr,
    row_ptr,
    first_pair_ptr,
    num_used_ptr,
    y_ptr,
    num_tokens,
    width,
    WEIGHTED: tl.constexpr,
    PAIRS: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (columns < width) | WHOLE_COLUMNS
    num_used = tl.load(num_used_ptr)
    if PAIRS is None:
        first_pair = tl.load(first_pair_ptr + token, mask=is_token, other=0)
        end_pair = tl.load(first_pair_ptr + token + 1, mask=is_token, other=0)
        most_pairs = tl.max(end_pair - first_pair, axis=0)
    else:
        first_pair = token.to(tl.int64) * PAIRS
        end_pair = first_pair + PAIRS
        most_pairs = PAIRS
    acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    # Unrolled, so that the loads of several pairs are under way together.
    for nth in tl.range(0, most_pairs, loop_unroll_factor=4):
        pair = first_pair + nth
        is_pair = is_token & (pair < end_pair)
        row = tl.load(row_ptr + pair, mask=is_pair, other=0)
        is_pair = is_pair & (row < num_used)
        value_ptr = rows_ptr + row[:, None] * width + columns[None, :]
        value = tl.load(value_ptr, mask=is_pair[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weight_ptr + pair, mask=is_pair, other=0.0)[:, None]
        acc += value
    y_place_ptr = y_ptr + token.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(y_place_ptr, acc, mask=is_token[:, None] & is_column[None, :])
