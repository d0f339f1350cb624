"""The grouped product as its formula reads; the twin that every fast path is tested against."""

import torch
from torch import Tensor


def grouped_product(rows_ND: Tensor, weight_EDH: Tensor, end_E: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix; zeros for the rows past the last end. Returns [N, H].

    `unbind`, not an index per expert: the gradient of `weight[e]` is a full-size zero tensor for each e.
    """
    ends = end_E.tolist()
    parts = [
        rows_ND[start:end] @ weight_DH
        for weight_DH, start, end in zip(weight_EDH.unbind(0), [0, *ends[:-1]], ends, strict=True)
    ]
    return torch.cat([*parts, parts[0].new_zeros(rows_ND.shape[0] - ends[-1], weight_EDH.shape[2])])
