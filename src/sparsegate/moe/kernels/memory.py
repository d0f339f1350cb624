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
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

# Below this size the C library keeps freed memory itself.
_SMALLEST = 16 << 20
# A freed block that so many requests did not want is given back: of a few steps of the model at hand.
_PATIENCE = 256
_PATIENCE_PER_BLOCK = 4


class _Freed(NamedTuple):
    block: mmap.mmap
    at_request: int


class _Blocks:
    """Blocks of memory by size, how many there are, free or not, and how many requests there were.

    Several threads take, and a block comes back in whatever thread and moment its tensor dies in, the middle
    of another call included. So no lock: a block belongs to whoever popped it, and that happens at once. The
    numbers may be off by a few.
    """

    def __init__(self) -> None:
        self.free: dict[int, deque[_Freed]] = {}
        self.num_blocks = 0
        self.num_requests = 0

    def take(self, num_bytes: int) -> mmap.mmap:
        """A block of that size. OSError: there is no memory, not even with all free blocks given back."""
        with suppress(KeyError, IndexError):
            return self.free[num_bytes].pop().block
        try:
            block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            self.forget(patience=0)
            block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages
            block.madvise(mmap.MADV_HUGEPAGE)
        self.num_blocks += 1
        return block

    def give_back(self, block: mmap.mmap) -> None:
        """Called when the last tensor over the block has died."""
        self.free.setdefault(len(block), deque()).append(_Freed(block, self.num_requests))

    def count_request(self) -> None:
        """To be called for small tensors too, so that what a larger model left does not stay for good."""
        self.num_requests += 1
        if self.num_blocks:
            self.forget(patience=max(_PATIENCE, _PATIENCE_PER_BLOCK * self.num_blocks))

    def forget(self, *, patience: int) -> None:
        """Give the system back what was not wanted for that many requests."""
        for freed in list(self.free.values()):
            with suppress(IndexError):
                while (oldest := freed.popleft()).at_request <= self.num_requests - patience:
                    self.num_blocks -= 1
                freed.appendleft(oldest)


_BLOCKS = _Blocks()
_is_recycling = sys.platform == "linux"


def set_recycling(enabled: bool, /) -> None:
    """Whether large tensors lie in recycled memory from now on; False gives all that is free back.

    On Linux it is on at the start, elsewhere it does not exist.
    """
    global _is_recycling
    _is_recycling = enabled and sys.platform == "linux"
    if not enabled:
        _BLOCKS.forget(patience=0)


def recycled_empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, in used memory where the tensor is large.

    The memory is taken again when no tensor refers to it any more, views included. The storage of a large one
    cannot be resized.
    """
    _BLOCKS.count_request()
    num_bytes = math.prod(shape) * dtype.itemsize
    is_poisoned = torch.are_deterministic_algorithms_enabled()  # torch then fills what it does not initialise
    if num_bytes < _SMALLEST or is_poisoned or not _is_recycling:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        block = _BLOCKS.take(_rounded(num_bytes))
    except OSError:
        return torch.empty(
            shape, dtype=dtype, device="cpu"
        )  # for torch's own error, if it has no memory either
    view = memoryview(block)
    # As the process leaves, tensors may still be at work: in other threads, in what is called at exit.
    weakref.finalize(view, _BLOCKS.give_back, block).atexit = False  # pyrefly: ignore[missing-attribute]
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)


def _rounded(num_bytes: int) -> int:
    """Up to the next of eight sizes between powers of two: batches of nearly one size share blocks."""
    step = 1 << (num_bytes.bit_length() - 4)
    return -(-num_bytes // step) * step
