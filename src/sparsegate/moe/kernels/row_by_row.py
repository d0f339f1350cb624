"""Products of few rows for each expert on the CPU, bound by reading the weights: many experts in one call.

A row times a matrix is a sum of the matrix's rows, each weighted by a number: what torch calls an embedding
bag, for which it has a kernel that reads ahead. With a few rows for each expert that is faster than a matrix
product for each (docs/performance.md).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Where the mean of the experts in use has so few rows, and so few bytes in rows times matrix, it was mostly
# the faster way (`benchmarks/few_rows.py`). With more, a product is: it reads the matrix once for all rows,
# which is why no expert may have many times the mean either.
_MOST_ROWS = 12
_MOST_ROWS_TIMES_BYTES = 9 << 20
_MOST_OVER_MEAN = 4
# Indices made at a time, eight bytes each: one for each number of each row.
_NUMBERS_AT_ONCE = 1 << 22


def suits(count_E: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether it is the faster way for these experts.

    count_E: int64, the rows of each expert. weights: all of [E, D, H]. dtype: of the products.
    """
    num_used, num_rows = int(count_E.count_nonzero()), int(count_E.sum())
    return (
        0 < num_rows <= _MOST_ROWS * num_used
        and int(count_E.max()) * num_used <= _MOST_OVER_MEAN * num_rows
        and all(_is_fast(weight_EDH, dtype) for weight_EDH in weights)
        and num_rows * max(w[0].nbytes for w in weights) <= _MOST_ROWS_TIMES_BYTES * num_used
    )


def _is_fast(weight_EDH: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has the kernel for it."""
    return (
        weight_EDH.dtype == dtype
        and dtype in (torch.float32, torch.bfloat16)
        and weight_EDH.is_contiguous()
        and weight_EDH.numel() > 0
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")  # others have not been measured
    )


def in_turn(num_rows: int, *widths: int) -> Iterator[slice]:
    """The rows, some after the other, so that what is made of them stays small. widths: of the matrices."""
    at_once = max(1, _NUMBERS_AT_ONCE // max(widths))
    return (slice(first, min(first + at_once, num_rows)) for first in range(0, num_rows, at_once))


def products(rows_ND: Tensor, weight_EDH: Tensor, expert_N: Tensor) -> Tensor:
    """Multiply each row by its expert's matrix: [N, H]. expert_N: ascending, so that caches serve."""
    num_inputs, num_outputs = weight_EDH.shape[1:]
    index_ND = expert_N[:, None] * num_inputs + torch.arange(num_inputs, device=expert_N.device)
    return F.embedding_bag(
        index_ND, weight_EDH.detach().view(-1, num_outputs), mode="sum", per_sample_weights=rows_ND
    )
