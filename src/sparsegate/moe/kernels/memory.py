"""Large CPU tensors in memory that was used before.

torch asks the operating system for fresh memory for every large tensor and gives it back when the tensor
dies. Fresh memory arrives page by page, each cleared on its first use, so that writing it takes several times
as long as writing memory that was written before (docs/performance.md). A gradient of all experts is the
largest tensor of a training step, and comes back in every step.
"""

import math
import mmap
import sys
import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

# Below this size the C library keeps freed memory itself.
_SMALLEST = 16 << 20
# A freed block that this many requests did not want is given back.
_PATIENCE = 64


class _Freed(NamedTuple):
    block: mmap.mmap
    at_request: int


class _Blocks:
    """Blocks of memory by size, and how many requests there were.

    Several threads take, and a block comes back in whatever thread and moment its tensor dies in, the middle
    of another call included. So no lock: a block belongs to whoever popped it, and that happens at once.
    """

    def __init__(self) -> None:
        self.free: dict[int, deque[_Freed]] = {}
        self.num_requests = 0

    def take(self, num_bytes: int) -> mmap.mmap:
        self.num_requests += 1
        self._forget_the_unwanted()
        try:
            return self.free[num_bytes].pop().block
        except (KeyError, IndexError):
            block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            block.madvise(mmap.MADV_HUGEPAGE)
            return block

    def give_back(self, block: mmap.mmap) -> None:
        """Called when the last tensor over the block has died."""
        self.free.setdefault(len(block), deque()).append(_Freed(block, self.num_requests))

    def _forget_the_unwanted(self) -> None:
        for freed in list(self.free.values()):
            try:
                while (oldest := freed.popleft()).at_request < self.num_requests - _PATIENCE:
                    pass
                freed.appendleft(oldest)
            except IndexError:
                pass


_BLOCKS = _Blocks()


def recycled_empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, in used memory where the tensor is large.

    The memory is taken again when no tensor refers to it any more, views included.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    poisoned = torch.are_deterministic_algorithms_enabled()  # torch then fills what it does not initialise
    if num_bytes < _SMALLEST or poisoned or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    block = _BLOCKS.take(_rounded(num_bytes))
    view = memoryview(block)
    weakref.finalize(view, _BLOCKS.give_back, block)
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)


def _rounded(num_bytes: int) -> int:
    """Up to the next of eight sizes between powers of two: batches of nearly one size share blocks."""
    step = 1 << (num_bytes.bit_length() - 4)
    return -(-num_bytes // step) * step
