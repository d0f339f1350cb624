"""Noisy top-k choice on the CPU: some rows after the other, each while they are in the cache, in all threads.

As single operators the equations read and write some thirty matrices of rows times experts; here such
matrices come in as logits and noise, and go out as gradients. Second derivatives take the way of the
equations.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import recycled_empty
from .noisy_choice import SMALLEST_STD, by_operator
from .workers import in_parallel

# What a temporary has at most, so that several fit into a core's caches; but for very many experts.
_NUMBERS_PER_TASK = 1 << 18
_FEWEST_ROWS_PER_TASK = 16
# Where torch.topk does not sort the few best alone, it takes some 10 ns a number. One maximum after the other
# takes some 0.7 ns a number each, but more with few columns, and 20 microseconds in a call.
_FEWEST_COLUMNS, _FEWEST_COLUMNS_OVER_K, _FEWEST_NUMBERS_OVER_K = 32, 64, 1 << 12
_MOST_MAXIMA = 8


class _Segment(NamedTuple):
    """Rows of one group."""

    group: int
    rows: slice


class _Task(NamedTuple):
    """Rows that follow each other, and the segments that they are: none, if they are in no sum."""

    rows: slice
    segments: range


class _Rows(NamedTuple):
    """Some rows, and what forward and backward both compute of them."""

    clean_NB: Tensor
    raw_std_NB: Tensor
    noise_NB: Tensor
    std_NB: Tensor
    is_used_N1: Tensor | None

    def noisy(self, expert_NK1: Tensor) -> Tensor:
        """The noisy logits of the chosen experts, and of the one left out."""
        noise_NK1, std_NK1 = self.noise_NB.gather(1, expert_NK1), self.std_NB.gather(1, expert_NK1)
        return self.clean_NB.gather(1, expert_NK1) + noise_NK1 * std_NK1

    def in_deviations(self, top_NK1: Tensor, chosen_NK: Tensor, safe_std_NB: Tensor) -> Tensor:
        """The argument of eq. 9's distribution: how many deviations a logit lies above its threshold."""
        above_NB = (self.clean_NB - top_NK1[:, -2:-1]).div_(safe_std_NB)
        chosen_above_NK = self.clean_NB.gather(1, chosen_NK) - top_NK1[:, -1:]
        return above_NB.scatter_(1, chosen_NK, chosen_above_NK.div_(safe_std_NB.gather(1, chosen_NK)))

    def only_used(self, value: Tensor) -> Tensor:
        """Zeros in place of the rows that are in no sum, written into `value`."""
        return value if self.is_used_N1 is None else value.masked_fill_(~self.is_used_N1, 0.0)


@torch.library.custom_op("sparsegate::noisy_choice", mutates_args=())
def _forward(
    logits_NS: Tensor,
    noise_NB: Tensor,
    group_N: Tensor | None,
    num_groups: int,
    k: int,
    noise_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of k experts for each row, the three sums, and the k + 1 best experts."""
    num_rows, num_experts = noise_NB.shape
    segments, tasks = _cut(num_rows, num_experts, group_N, num_groups)
    expert_NK1 = torch.empty(num_rows, k + 1, dtype=torch.int64)
    weight_NK = logits_NS.new_empty(num_rows, k)
    load_SB = logits_NS.new_zeros(len(segments), num_experts)
    probability_SB, z_U = torch.zeros_like(load_SB), logits_NS.new_zeros(len(tasks))
    best = _maxima if _suits_maxima(noise_NB, k + 1) else torch.topk

    def compute(index: int) -> None:
        rows, own = tasks[index]
        some = _some_rows(rows, logits_NS, noise_NB, group_N, num_groups, noise_epsilon)
        top_NK1, chosen_NK1 = best(some.clean_NB + some.noise_NB * some.std_NB, k + 1)
        expert_NK1[rows] = chosen_NK1
        torch.softmax(top_NK1[:, :k], dim=-1, out=weight_NK[rows])
        if own:
            safe_std_NB = some.std_NB.clamp_min(SMALLEST_STD)
            above_NB = some.in_deviations(top_NK1, chosen_NK1[:, :k], safe_std_NB)
            in_topk_NB = some.only_used(torch.special.ndtr(above_NB))
            z_N1 = some.clean_NB.logsumexp(dim=-1, keepdim=True)
            probability_NB = some.only_used((some.clean_NB - z_N1).exp_())
            for segment in own:
                of_task = _within(rows, segments[segment].rows)
                torch.sum(in_topk_NB[of_task], dim=0, out=load_SB[segment])
                torch.sum(probability_NB[of_task], dim=0, out=probability_SB[segment])
            z_U[index] = some.only_used(z_N1).square_().sum()

    in_parallel(compute, range(len(tasks)))
    group_S = torch.tensor([segment.group for segment in segments], dtype=torch.int64)
    load_AB, probability_AB = (
        logits_NS.new_zeros(num_groups, num_experts).index_add(0, group_S, sums_SB)
        for sums_SB in (load_SB, probability_SB)
    )
    return weight_NK, load_AB, probability_AB, z_U.sum(), expert_NK1


@torch.library.custom_op("sparsegate::noisy_choice_backward", mutates_args=())
def _backward(
    grad_weight_NK: Tensor | None,
    grad_load_AB: Tensor | None,
    grad_probability_AB: Tensor | None,
    grad_z: Tensor | None,
    logits_NS: Tensor,
    noise_NB: Tensor,
    group_N: Tensor | None,
    expert_NK1: Tensor,
    weight_NK: Tensor,
    num_groups: int,
    noise_epsilon: float,
    needs_noise: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logits_NS, and of noise_NB, which is empty if not needed."""
    num_rows, num_experts = noise_NB.shape
    segments, tasks = _cut(num_rows, num_experts, group_N, num_groups)
    grad_logits_NS = recycled_empty(num_rows, 2 * num_experts, dtype=logits_NS.dtype)
    grad_noise_NB = noise_NB.new_zeros(num_rows if needs_noise else 0, num_experts)

    def of_rows(grad_AB: Tensor, task: _Task) -> Tensor:
        """The gradients of the sums of each row's group: one row where they are all of one."""
        if len(task.segments) == 1:
            return grad_AB[segments[task.segments[0]].group][None]
        assert group_N is not None
        return grad_AB.index_select(0, group_N[task.rows])

    def compute(index: int) -> None:
        task = tasks[index]
        rows = task.rows
        some = _some_rows(rows, logits_NS, noise_NB, group_N, num_groups, noise_epsilon)
        top_expert_NK1 = expert_NK1[rows]
        grad_NB, grad_std_NB = torch.zeros_like(some.std_NB), torch.zeros_like(some.std_NB)
        grad_top_NK1 = _of_weights(None if grad_weight_NK is None else grad_weight_NK[rows], weight_NK[rows])
        if task.segments:
            if grad_load_AB is not None:
                grad_load_NB = of_rows(grad_load_AB, task)
                _add_of_load(some, top_expert_NK1, grad_load_NB, grad_NB, grad_std_NB, grad_top_NK1)
            if grad_probability_AB is not None:
                _add_of_probability(some, of_rows(grad_probability_AB, task), grad_NB)
            if grad_z is not None:
                _add_of_z(some, grad_z, grad_NB)
        noise_NK1, std_NK1 = (of_NB.gather(1, top_expert_NK1) for of_NB in (some.noise_NB, some.std_NB))
        grad_NB.scatter_add_(1, top_expert_NK1, grad_top_NK1)
        grad_std_NB.scatter_add_(1, top_expert_NK1, grad_top_NK1 * noise_NK1)
        grad_raw_NB = torch.ops.aten.softplus_backward(grad_std_NB, some.raw_std_NB, 1, 20)
        torch.cat([grad_NB, grad_raw_NB], dim=1, out=grad_logits_NS[rows])
        if needs_noise:
            grad_noise_NB[rows].scatter_(1, top_expert_NK1, grad_top_NK1 * std_NK1)

    in_parallel(compute, range(len(tasks)))
    return grad_logits_NS, grad_noise_NB


def _suits_maxima(value_NB: Tensor, k: int) -> bool:
    """Whether `_maxima` are the faster way, for all rows of a call."""
    num_columns = value_NB.shape[1]
    return (
        _FEWEST_COLUMNS <= num_columns < _FEWEST_COLUMNS_OVER_K * k
        and k <= _MOST_MAXIMA
        and value_NB.numel() >= _FEWEST_NUMBERS_OVER_K * k
        and value_NB.dtype in (torch.float32, torch.float64)  # which count the columns without rounding
    )


def _maxima(value_NB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, and where they are, the first of equals first.

    value_NB: may be overwritten. Where one number of it is none, or infinite, it is torch.topk, which has an
    order for these, too.
    """
    num_rows, num_columns = value_NB.shape
    if not bool(value_NB.sum().isfinite()):
        return value_NB.topk(k, dim=-1)
    top_NK, index_NK = value_NB.new_empty(num_rows, k), torch.empty(num_rows, k, dtype=torch.int64)
    from_last_B = torch.arange(num_columns, 0, -1, dtype=value_NB.dtype)
    is_largest_NB = torch.empty_like(value_NB)
    for column in range(k):
        largest_N1, index_N1 = top_NK[:, column, None], index_NK[:, column, None]
        torch.amax(value_NB, dim=1, keepdim=True, out=largest_N1)
        # Zeros and ones that are no bools, and maxima that do not bring their index: these have fast kernels.
        is_largest_NB.copy_(value_NB).eq_(largest_N1)
        index_N1.copy_(is_largest_NB.mul_(from_last_B).amax(dim=1, keepdim=True).neg_().add_(num_columns))
        value_NB.scatter_(1, index_N1, -torch.inf)
    return top_NK, index_NK


def _of_weights(grad_NK: Tensor | None, weight_NK: Tensor) -> Tensor:
    """The gradient of the k + 1 best noisy logits, by way of the softmax over k of them."""
    grad_NK1 = F.pad(torch.zeros_like(weight_NK), (0, 1))
    if grad_NK is not None:
        grad_NK1[:, :-1] = torch._softmax_backward_data(grad_NK, weight_NK, 1, weight_NK.dtype)
    return grad_NK1


def _add_of_load(
    some: _Rows,
    expert_NK1: Tensor,
    grad_load_NB: Tensor,
    grad_NB: Tensor,
    grad_std_NB: Tensor,
    grad_top_NK1: Tensor,
) -> None:
    """Add the gradients of logits, deviations and thresholds, by way of eq. 8 and 9."""
    chosen_NK = expert_NK1[:, :-1]
    safe_std_NB = some.std_NB.clamp_min(SMALLEST_STD)
    above_NB = some.in_deviations(some.noisy(expert_NK1), chosen_NK, safe_std_NB)
    density_NB = (above_NB * above_NB).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    through_NB = some.only_used(density_NB.mul_(grad_load_NB).div_(safe_std_NB))
    grad_NB += through_NB
    through_std_NB = through_NB * above_NB
    if not bool(some.std_NB.amin() >= SMALLEST_STD):  # hardly ever, and a mask takes longer than this
        through_std_NB.masked_fill_(some.std_NB < SMALLEST_STD, 0.0)
    grad_std_NB -= through_std_NB
    through_chosen_NK = through_NB.gather(1, chosen_NK)
    grad_top_NK1[:, -1] -= through_chosen_NK.sum(dim=1)
    grad_top_NK1[:, -2] -= through_NB.scatter_(1, chosen_NK, 0.0).sum(dim=1)


def _add_of_probability(some: _Rows, grad_probability_NB: Tensor, grad_NB: Tensor) -> None:
    """Add the gradient of the logits by way of their softmax."""
    probability_NB = some.clean_NB.softmax(dim=-1)
    mean_N1 = (probability_NB * grad_probability_NB).sum(dim=1, keepdim=True)
    grad_NB += some.only_used(probability_NB.mul_(grad_probability_NB - mean_N1))


def _add_of_z(some: _Rows, grad_z: Tensor, grad_NB: Tensor) -> None:
    """Add the gradient of the logits by way of their log-sum-exp."""
    z_N1 = some.clean_NB.logsumexp(dim=-1, keepdim=True)
    grad_NB += some.only_used((some.clean_NB - z_N1).exp_().mul_(2 * grad_z * z_N1))


def _some_rows(
    rows: slice,
    logits_NS: Tensor,
    noise_NB: Tensor,
    group_N: Tensor | None,
    num_groups: int,
    noise_epsilon: float,
) -> _Rows:
    # Contiguous, or every operator would take the short rows one by one.
    clean_NB, raw_std_NB = (half.contiguous() for half in logits_NS[rows].chunk(2, dim=1))
    return _Rows(
        clean_NB=clean_NB,
        raw_std_NB=raw_std_NB,
        noise_NB=noise_NB[rows],
        std_NB=F.softplus(raw_std_NB).add_(noise_epsilon),
        # The rows of one of several groups are used, all of them.
        is_used_N1=None if group_N is None or num_groups > 1 else (group_N[rows] == 0)[:, None],
    )


def _cut(
    num_rows: int, num_experts: int, group_N: Tensor | None, num_groups: int
) -> tuple[list[_Segment], list[_Task]]:
    """Segments of one group each, and tasks of one or more of them; whatever the number of threads."""
    ends = [num_rows]
    if group_N is not None and num_groups > 1:
        ends = torch.bincount(group_N, minlength=num_groups + 1).cumsum(0).tolist()
    at_once = max(_FEWEST_ROWS_PER_TASK, _NUMBERS_PER_TASK // num_experts)
    segments: list[_Segment] = []
    tasks: list[_Task] = []
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        for first in range(start, end, at_once):
            rows = slice(first, min(first + at_once, end))
            if group == num_groups:
                tasks.append(_Task(rows, range(0)))
                continue
            segments.append(_Segment(group, rows))
            if tasks and rows.stop - tasks[-1].rows.start <= at_once:
                task = tasks.pop()
                tasks.append(
                    _Task(slice(task.rows.start, rows.stop), range(task.segments.start, len(segments)))
                )
            else:
                tasks.append(_Task(rows, range(len(segments) - 1, len(segments))))
    return segments, tasks


def _within(outer: slice, inner: slice) -> slice:
    """Where the rows of `inner` stand among those of `outer`."""
    return slice(inner.start - outer.start, inner.stop - outer.start)


# With several groups, group_N must ascend.
noisy_choice = by_operator(_forward, _backward)
