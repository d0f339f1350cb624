"""Work on the rows of one expert after the other on the CPU, with all threads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .workers import in_parallel

# As many rows for each thread keep one product as fast as several products side by side.
_ROWS_PER_THREAD = 128
# So many that threads which take them one by one are done at about the same time.
_FEWEST_GROUPS_PER_THREAD = 8


class Group(NamedTuple):
    """Experts that have rows, how many each has, and where all of these stand, one expert after the other."""

    experts: list[int]
    counts: list[int]
    rows: slice


def groups_of(end_E: Tensor, *, most_rows: int = 0, most_experts: int = 1) -> list[Group]:
    """All experts that have rows, several in a group where they have few; the heaviest group first, so that
    no thread begins it last.

    end_E: int64, one past each expert's last row. most_rows, most_experts: of a group of several; of fewer
    rows altogether there are still some groups for each thread.
    """
    most_rows = min(most_rows, int(end_E[-1]) // (_FEWEST_GROUPS_PER_THREAD * torch.get_num_threads()))
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    used = count_E.nonzero().squeeze(1)
    groups: list[Group] = []
    experts: list[int] = []
    counts: list[int] = []
    start = end = 0
    for expert, count in zip(used.tolist(), count_E[used].tolist(), strict=True):
        if experts and (end + count - start > most_rows or len(experts) >= most_experts):
            groups.append(Group(experts, counts, slice(start, end)))
            experts, counts, start = [], [], end
        experts.append(expert)
        counts.append(count)
        end += count
    if experts:
        groups.append(Group(experts, counts, slice(start, end)))
    return sorted(groups, key=_num_rows, reverse=True)


def _num_rows(group: Group) -> int:
    return group.rows.stop - group.rows.start


def without_rows(end_E: Tensor) -> list[int]:
    """The experts that have none."""
    return end_E.diff(prepend=end_E.new_zeros(1)).eq(0).nonzero().squeeze(1).tolist()


def for_each(compute: Callable[[Group], None], groups: list[Group]) -> None:
    """Groups of few rows side by side, one thread each; the others one after the other with all threads."""
    num_threads = torch.get_num_threads()
    num_rows = sum(map(_num_rows, groups))
    # A group that has more than a thread's fair share would keep the others waiting.
    alone = min(_ROWS_PER_THREAD * num_threads, num_rows // num_threads + 1)
    few: list[int] = []
    for index, group in enumerate(groups):
        if _num_rows(group) >= alone:
            compute(group)
        else:
            few.append(index)
    in_parallel(lambda index: compute(groups[index]), few)
