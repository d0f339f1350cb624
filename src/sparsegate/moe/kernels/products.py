"""One expert's product on the CPU, by the library that is fastest at it."""

import torch
from torch import Tensor

# With fewer rows than this oneDNN gains nothing.
_FEWEST_ROWS = 4
# A call of it takes a while before it multiplies, and is no gain where both the matrix and the product are
# smaller than these: numbers, and multiply-adds (`benchmarks/cpu_products.py`).
_FEWEST_NUMBERS, _FEWEST_MULTIPLY_ADDS = 1 << 19, 1 << 22


def multiply(left_ND: Tensor, right_DH: Tensor, *, out: Tensor) -> None:
    """Write left @ right into `out` [N, H].

    torch.mm multiplies float32 with the BLAS it was built with, other dtypes with oneDNN. oneDNN is the
    faster of the two in float32 as well (docs/performance.md), but has no way to write into place: the copy
    is cheaper than what it saves.
    """
    if _suits_onednn(left_ND, right_DH):
        out.copy_(torch.ops.mkldnn._linear_pointwise(left_ND, right_DH.t(), None, "none", [], ""))
    else:
        torch.mm(left_ND, right_DH, out=out)


def product(left_ND: Tensor, right_DH: Tensor) -> Tensor:
    """Return left @ right, [N, H], as `multiply` computes it."""
    if _suits_onednn(left_ND, right_DH):
        return torch.ops.mkldnn._linear_pointwise(left_ND, right_DH.t(), None, "none", [], "")
    return torch.mm(left_ND, right_DH)


def _suits_onednn(left_ND: Tensor, right_DH: Tensor) -> bool:
    return (
        left_ND.dtype == right_DH.dtype == torch.float32
        and len(left_ND) >= _FEWEST_ROWS
        and left_ND.is_contiguous()
        and (right_DH.is_contiguous() or right_DH.t().is_contiguous())
        and (right_DH.numel() >= _FEWEST_NUMBERS or len(left_ND) * right_DH.numel() >= _FEWEST_MULTIPLY_ADDS)
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
