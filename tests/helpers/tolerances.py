"""How close is close: one table, by the dtype that the values were computed in."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Relative and absolute, for sums of up to some hundred terms of order one."""

    rtol: float
    atol: float


TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-11),
    torch.float32: Tolerance(rtol=2e-5, atol=1e-5),
    torch.bfloat16: Tolerance(rtol=4e-2, atol=4e-2),
    torch.float16: Tolerance(rtol=4e-3, atol=4e-3),
}


def assert_close(
    actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None, scale: float = 1
) -> None:
    """Values agree up to the rounding of `dtype` (None: of `actual`), NaN with NaN; the oracle may be wider.

    scale: the size of the terms that were added up, where it is not about one.
    """
    tolerance = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance.rtol, atol=scale * tolerance.atol, equal_nan=True
    )
