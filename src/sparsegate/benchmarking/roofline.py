"""The least time that a machine can take: arithmetic at the dense rate, and the traffic of the weights.

Arithmetic is counted at the rate of a dense layer of the same multiply-adds, timed in the same rounds.
Traffic is what no algorithm can leave out once the weights outgrow the caches: the weights of the experts in
use are read in the forward pass, and read again in the backward pass, and the gradients of all experts are
written once. Rows, the gate and the optimizer are not counted. If the two overlap perfectly the time is the
longer of them, if they come one after the other their sum.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Bytes per second of the main memory, with the threads that torch has at the time.

    write: into memory that the process has used before. fresh_write: into memory that it has just been
    given, whose pages the operating system clears first, as happens to gradients after
    `zero_grad(set_to_none=True)`; no part of the least time.
    """

    read: float
    write: float
    fresh_write: float


@dataclass(frozen=True, kw_only=True)
class LeastTime:
    """Seconds."""

    arithmetic: float
    traffic: float

    @property
    def overlapped(self) -> float:
        return max(self.arithmetic, self.traffic)

    @property
    def in_turn(self) -> float:
        return self.arithmetic + self.traffic


def least_time(
    *,
    dense_seconds: float,
    used_weight_bytes: int,
    gradient_bytes: int,
    training: bool,
    bandwidth: Bandwidth,
) -> LeastTime:
    """dense_seconds: of the dense layer of the same multiply-adds, forward, or forward and backward."""
    reads = (2 if training else 1) * used_weight_bytes / bandwidth.read
    writes = gradient_bytes / bandwidth.write if training else 0.0
    return LeastTime(arithmetic=dense_seconds, traffic=reads + writes)


def measure_bandwidth(num_bytes: int, *, repeats: int = 5) -> Bandwidth:
    """The best of some passes over a buffer, which must be larger than all caches."""
    buffer = torch.ones(num_bytes // 4)
    return Bandwidth(
        read=num_bytes / _best(buffer.sum, repeats),
        write=num_bytes / _best(lambda: buffer.fill_(1.0), repeats),
        fresh_write=num_bytes / _best(lambda: torch.empty_like(buffer).fill_(1.0), repeats),
    )


def _best(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)
