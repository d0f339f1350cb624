"""Some rows of a table that is drawn at random: those of the whole table."""

from math import lcm

from torch import Tensor

# torch makes normal numbers on the CPU in groups of this many, and the last group of a tensor anew.
_GROUP = 16
# Numbers that are drawn at once where not all are kept.
_BLOCK = 1 << 16


def draw_rows(table: Tensor, *, std: float, own: range, num_rows: int) -> None:
    """Fill a table with normal numbers in place; its first axis has the rows `own` out of `num_rows`.

    On the CPU these are the numbers that the rows have when all are drawn together, and the generator is
    afterwards where it would be: all are drawn, and no more than a block of the others is held.
    """
    if table.is_meta:
        return
    numbers = max(table.shape[1:].numel(), 1)
    step = lcm(numbers, _GROUP) // numbers
    step *= -(-_BLOCK // (step * numbers))
    starts = [*range(0, num_rows, step)]
    if len(starts) > 1 and (num_rows - starts[-1]) * numbers < _GROUP:
        del starts[-1]
    for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
        drawn = table.new_empty(end - start, *table.shape[1:]).normal_(0, std)
        first, last = _place(own, start), _place(own, end)
        table.detach()[first:last] = drawn[[row - start for row in own[first:last]]]


def _place(own: range, row: int) -> int:
    """How many of the rows are below one."""
    return min(max(-(-(row - own.start) // own.step), 0), len(own))
