"""Independent tasks on the CPU, one thread each.

A product of few rows leaves several threads little to share; several products at once leave each of them
much to do. torch computes outside Python's lock, so Python's own threads serve.
"""

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier, local

import torch
from torch import Tensor

from ..precision import autocast_off, flushed_denormals

_CPU = torch.device("cpu")


def in_parallel(function: Callable[[int], object], tasks: Iterable[int]) -> None:
    """Call the function for every task, in as many threads as torch uses, the first tasks first.

    Each call computes with one thread, without autograd, autocast and denormal numbers, and in the caller's
    inference mode. The first exception is raised when all threads have stopped.
    """
    num_threads, queue = torch.get_num_threads(), deque(tasks)
    if num_threads == 1 or len(queue) < 2:
        with autocast_off(_CPU), flushed_denormals():  # as it is in the other threads
            _drain(function, queue, torch.is_inference_mode_enabled())
        return
    executor = _executor(num_threads)
    running: list[Future[None]] = []
    try:
        for _ in range(min(num_threads, len(queue))):
            running.append(executor.submit(_drain, function, queue, torch.is_inference_mode_enabled()))
        errors = [future.exception() for future in running]
    except BaseException:  # Ctrl-C: the caller goes on, and nothing may then change under its hands
        queue.clear()
        wait(running)
        raise
    for error in filter(None, errors):
        raise error


class Scratch(local):
    """Memory that each thread uses again: what it allocates and frees, the system may take and clear."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}
        self._cast: dict[Hashable, int] = {}

    def empty(self, name: Hashable, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The thread's tensor of that name, always of one shape and dtype, with whatever it held last."""
        if name not in self._tensors:
            self._tensors[name] = torch.empty(shape, dtype=dtype, device=_CPU)
        return self._tensors[name]

    def cast(self, tensors: Tensor, dtype: torch.dtype, index: int) -> Tensor:
        """tensors[index], or in another dtype a copy in the thread's memory for one of these tensors.

        Asked for the same one again, it is the copy that was made before.
        """
        if tensors.dtype == dtype:
            return tensors[index]
        key = id(tensors)
        copy = self.empty(key, tensors.shape[1:], dtype)
        if self._cast.get(key) != index:
            copy.copy_(tensors[index])
            self._cast[key] = index
        return copy


def _drain(function: Callable[[int], object], queue: deque[int], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        while True:
            try:
                task = queue.popleft()
            except IndexError:
                return
            function(task)


@cache
def _executor(num_threads: int) -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="sparsegate", initializer=_prepare_thread)
    started = Barrier(num_threads)
    try:
        for future in [executor.submit(started.wait) for _ in range(num_threads)]:
            future.result()
    except BaseException:
        started.abort()  # or those that have started would wait for those that cannot
        raise
    # A thread's number of threads is its own, but the last one set is what new threads begin with.
    torch.set_num_threads(num_threads)
    os.register_at_fork(after_in_child=_executor.cache_clear)  # a forked child has none of the threads
    return executor


def _prepare_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # without it the thread would look the number up again later
    torch.set_flush_denormal(True)
