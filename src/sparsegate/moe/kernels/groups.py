"""Work on the rows of one expert, or of one group, after the other on the CPU, with all threads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .workers import in_parallel

# As many rows for each thread keep one product as fast as several products side by side.
_ROWS_PER_THREAD = 128


class Group(NamedTuple):
    """An expert and its rows."""

    expert: int
    rows: slice


def groups_of(end_E: Tensor) -> list[Group]:
    """One for each expert that has rows, the heaviest first, so that no thread begins it last.

    end_E: int64, one past each expert's last row.
    """
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    used = count_E.nonzero().squeeze(1)
    used = used[count_E[used].argsort(descending=True, stable=True)]
    return [
        Group(expert, slice(end - count, end))
        for expert, end, count in zip(
            used.tolist(), end_E[used].tolist(), count_E[used].tolist(), strict=True
        )
    ]


def without_rows(end_E: Tensor) -> list[int]:
    """The experts that have none."""
    return end_E.diff(prepend=end_E.new_zeros(1)).eq(0).nonzero().squeeze(1).tolist()


def for_each(compute: Callable[[Group], None], groups: list[Group]) -> None:
    """Groups of few rows side by side, one thread each; the others one after the other with all threads."""
    num_threads = torch.get_num_threads()
    num_rows = sum(group.rows.stop - group.rows.start for group in groups)
    # A group that has more than a thread's fair share would keep the others waiting.
    alone = min(_ROWS_PER_THREAD * num_threads, num_rows // num_threads + 1)
    few: list[int] = []
    for index, group in enumerate(groups):
        if group.rows.stop - group.rows.start >= alone:
            compute(group)
        else:
            few.append(index)
    in_parallel(lambda index: compute(groups[index]), few)
