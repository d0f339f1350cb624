"""Products of few rows for each expert on the CPU, bound by reading the weights: all rows in one call.

A row times a matrix is a sum of the matrix's rows, each weighted by a number: what torch calls an embedding
bag, for which it has a kernel that reads ahead. With a few rows for each expert that is faster than a matrix
product for each (docs/performance.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to so many rows for each expert, and so many bytes in rows times the expert's matrix, it was the faster
# way (`benchmarks/few_rows.py`). Beyond, a product is: it reads the matrix once for all rows.
_MOST_ROWS = 16
_MOST_ROWS_TIMES_BYTES = 9 << 20


def suits(num_rows: int, num_used: int, weight_EDH: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is the faster way for so many rows of so many experts. dtype: of the products."""
    return (
        0 < num_rows <= _MOST_ROWS * num_used
        and 0 < num_rows * weight_EDH[0].nbytes <= _MOST_ROWS_TIMES_BYTES * num_used
        and weight_EDH.dtype == dtype
        and dtype in (torch.float32, torch.bfloat16)
        and weight_EDH.is_contiguous()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere the kernel is a plain loop
    )


def products(rows_ND: Tensor, weight_EDH: Tensor, expert_N: Tensor) -> Tensor:
    """Multiply each row by its expert's matrix: [N, H]. expert_N: ascending, so that caches serve."""
    width, hidden = weight_EDH.shape[1:]
    index_ND = expert_N[:, None] * width + torch.arange(width, device=expert_N.device)
    return F.embedding_bag(
        index_ND, weight_EDH.detach().view(-1, hidden), mode="sum", per_sample_weights=rows_ND
    )
