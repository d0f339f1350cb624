"""Which pairs are fit to be learned from."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LengthFilter:
    """Pairs of other lengths are left out of the training text. Valid and test text is never filtered.

    max_subwords: the longest side of a pair, its end not counted.
    max_ratio: how many times as many subwords the longer side may have as the shorter one.

    A pair with an empty side is always left out.
    """

    max_subwords: int = 256
    max_ratio: float = 9.0

    def __post_init__(self) -> None:
        if self.max_subwords < 1:
            raise ValueError(f"max_subwords ({self.max_subwords}) must be at least 1")
        if not 1 <= self.max_ratio < math.inf:
            raise ValueError(f"max_ratio ({self.max_ratio}) must be at least 1, and finite")

    def reasons(self, first_N: Lengths, second_N: Lengths) -> dict[str, npt.NDArray[Any]]:
        """For each reason to leave a pair out, a boolean for each pair of lengths, which has one at most."""
        shorter_N, longer_N = np.minimum(first_N, second_N), np.maximum(first_N, second_N)
        empty_N = shorter_N == 0
        too_long_N = ~empty_N & (longer_N > self.max_subwords)
        ratio_N = ~empty_N & ~too_long_N & (longer_N > self.max_ratio * shorter_N)
        return {"empty": empty_N, "too_long": too_long_N, "ratio": ratio_N}
