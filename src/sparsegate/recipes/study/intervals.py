"""How sure a perplexity is: over seeds, or with a single seed over pieces of the test text."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 4000
# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom; beyond these they are close to the last.
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its 95% interval. over: what varies: "seeds" or "test text"."""

    mean: float
    low: float
    high: float
    over: str

    def times(self, factor: float) -> Self:
        """Of the quantity times a positive number."""
        return replace(self, mean=factor * self.mean, low=factor * self.low, high=factor * self.high)

    def exp(self) -> Self:
        """Of e to the power of the quantity; the mean becomes a geometric one."""
        return replace(self, mean=math.exp(self.mean), low=math.exp(self.low), high=math.exp(self.high))


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of at least two runs, which differ by their seed alone.

    It tells what another seed would give on the same test text.

    >>> interval = over_seeds([1.0, 3.0])
    >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
    (-10.706, 2.0, 14.706)
    """
    mean, number = statistics.mean(values), len(values)
    half = _T[min(number - 1, len(_T)) - 1] * statistics.stdev(values) / number**0.5
    return Interval(mean=mean, low=mean - half, high=mean + half, over="seeds")


def over_pieces(nll_P: Sequence[float], tokens_P: Sequence[int]) -> Interval:
    """Percentile bootstrap of nats per token over the pieces of the test text, of one run.

    It tells what other text of the kind would give with the same weights, and nothing about other seeds.
    """
    nll, tokens = np.asarray(nll_P, dtype=np.float64), np.asarray(tokens_P, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(nll), size=(_RESAMPLES, len(nll)))
    rates = nll[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    return Interval(mean=float(nll.sum() / tokens.sum()), low=float(low), high=float(high), over="test text")
