"""Normal draws for stacked weights, whole or some rows of them."""

from math import lcm

import torch
from torch import Tensor, nn

# torch makes normal numbers on the CPU in groups of this many, and the last group of a tensor anew.
_GROUP = 16
# Numbers that are drawn at once where not all are kept.
_BLOCK = 1 << 16


def draw_normal(weight: Tensor, *, std: float, own: range, num_rows: int) -> None:
    """Fill a tensor with normal numbers in place; its first axis has the rows `own` out of `num_rows`.

    On the CPU these are the numbers that the rows have when all are drawn together, and the generator is
    afterwards where it would be: all are drawn, and no more than a block of the others is held. Narrow ones
    are drawn in float32, row by row.
    """
    if weight.is_meta:
        return
    if weight.dtype.itemsize < 4:
        with torch.no_grad():
            for row in range(num_rows):
                drawn = torch.randn(weight.shape[1:], device=weight.device).mul_(std)
                if row in own:
                    weight[own.index(row)] = drawn
    elif len(own) == num_rows:
        nn.init.normal_(weight, std=std)
    else:
        with torch.no_grad():
            _draw_some(weight, std, own, num_rows)


def _draw_some(weight: Tensor, std: float, own: range, num_rows: int) -> None:
    numbers = max(weight.shape[1:].numel(), 1)
    step = lcm(numbers, _GROUP) // numbers
    step *= -(-_BLOCK // (step * numbers))
    starts = [*range(0, num_rows, step)]
    if len(starts) > 1 and (num_rows - starts[-1]) * numbers < _GROUP:
        del starts[-1]
    for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
        drawn = weight.new_empty(end - start, *weight.shape[1:]).normal_(0, std)
        first, last = _place(own, start), _place(own, end)
        weight[first:last] = drawn[[row - start for row in own[first:last]]]


def _place(own: range, row: int) -> int:
    """How many of the rows are below one."""
    return min(max(-(-(row - own.start) // own.step), 0), len(own))
