"""Noisy top-k choice in one pass over logits and noise, and one back; second derivatives: the equations'."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..noisy_choice import SMALLEST_STD, by_operator
from .launch import processors

_NUMBERS = 1024  # of the rows that a program works on at once, eight for each thread
_PROGRAMS = 8  # for each multiprocessor
_SMALLEST_STD = tl.constexpr(SMALLEST_STD)


@torch.library.custom_op("sparsegate::triton_noisy_choice", mutates_args=())
def _forward(
    logits_NS: Tensor,
    noise_NB: Tensor,
    group_N: Tensor | None,
    num_groups: int,
    k: int,
    noise_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of k experts for each row, the three sums, and the k + 1 best experts."""
    if num_groups != 1:
        raise ValueError(
            f"num_groups ({num_groups}) must be 1 for the kernel 'triton'; 'equations' takes more"
        )
    logits_NS, noise_NB = logits_NS.contiguous(), noise_NB.contiguous()
    num_rows, num_experts = noise_NB.shape
    rows, columns, programs = _cut(noise_NB)
    expert_NK1 = torch.empty(num_rows, k + 1, dtype=torch.int64, device=logits_NS.device)
    weight_NK = logits_NS.new_empty(num_rows, k)
    # Of each program, so that they can be added in order.
    load_PB, probability_PB = (logits_NS.new_empty(programs, num_experts) for _ in range(2))
    z_P = logits_NS.new_empty(programs)
    if programs:
        _choice_kernel[(programs,)](
            logits_NS,
            noise_NB,
            expert_NK1 if group_N is None else group_N,
            expert_NK1,
            weight_NK,
            load_PB,
            probability_PB,
            z_P,
            num_rows,
            num_experts,
            noise_epsilon,
            GROUPED=group_N is not None,
            K=k,
            KEPT=triton.next_power_of_2(k + 1),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=_num_warps(rows * columns),
        )
    return weight_NK, load_PB.sum(0, keepdim=True), probability_PB.sum(0, keepdim=True), z_P.sum(), expert_NK1


@torch.library.custom_op("sparsegate::triton_noisy_choice_backward", mutates_args=())
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
    logits_NS, noise_NB = logits_NS.contiguous(), noise_NB.contiguous()
    num_rows, num_experts = noise_NB.shape
    rows, columns, programs = _cut(noise_NB)
    grad_logits_NS = torch.empty_like(logits_NS)
    grad_noise_NB = noise_NB.new_empty(num_rows if needs_noise else 0, num_experts)
    k = weight_NK.shape[1]
    # By way of the softmax over k of the k + 1 best.
    if grad_weight_NK is None:
        grad_top_NK1 = weight_NK.new_zeros(num_rows, k + 1)
    else:
        mean_N1 = (grad_weight_NK * weight_NK).sum(dim=1, keepdim=True)
        grad_top_NK1 = pad(weight_NK * (grad_weight_NK - mean_N1), (0, 1))

    def given(grad: Tensor | None) -> Tensor:
        return logits_NS if grad is None else grad.contiguous()

    if programs:
        _choice_gradient_kernel[(programs,)](
            given(grad_load_AB),
            given(grad_probability_AB),
            given(grad_z),
            logits_NS,
            noise_NB,
            expert_NK1 if group_N is None else group_N,
            expert_NK1,
            grad_top_NK1,
            grad_logits_NS,
            grad_noise_NB,
            num_rows,
            num_experts,
            noise_epsilon,
            GROUPED=group_N is not None,
            OF_LOAD=grad_load_AB is not None,
            OF_PROBABILITY=grad_probability_AB is not None,
            OF_Z=grad_z is not None,
            OF_NOISE=needs_noise,
            K=k,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=_num_warps(rows * columns),
        )
    return grad_logits_NS, grad_noise_NB


def _cut(noise_NB: Tensor) -> tuple[int, int, int]:
    """Rows at a time, columns that a power of two holds, and programs; 0 where there is nothing to do."""
    num_rows, num_experts = noise_NB.shape
    columns = max(16, triton.next_power_of_2(num_experts))
    rows = max(1, _NUMBERS // columns)
    return rows, columns, min(triton.cdiv(num_rows, rows), _PROGRAMS * processors(noise_NB.device))


def _num_warps(numbers: int) -> int:
    return max(4, numbers // 256)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "noise_epsilon"])
def _choice_kernel(
    logits_ptr,
    noise_ptr,
    group_ptr,
    expert_ptr,
    weight_ptr,
    load_ptr,
    probability_ptr,
    z_ptr,
    num_rows,
    num_experts,
    noise_epsilon,
    GROUPED: tl.constexpr,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    is_column = columns < num_experts
    kept = tl.arange(0, KEPT)
    load = tl.zeros((COLUMNS,), dtype=tl.float32)
    probability = tl.zeros((COLUMNS,), dtype=tl.float32)
    z_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows, is_row, is_used = _rows(tile, group_ptr, num_rows, GROUPED, ROWS)
        clean, raw_std, noise = _load(logits_ptr, noise_ptr, rows, is_row, columns, num_experts)
        std = _softplus(raw_std) + noise_epsilon
        noisy = clean + noise * std
        left = tl.where(is_column[None, :], _ordered(noisy), -(2**31))
        is_chosen = tl.zeros((ROWS, COLUMNS), dtype=tl.int1)
        top = tl.zeros((ROWS, KEPT), dtype=tl.float32)
        worst_kept = tl.zeros((ROWS,), dtype=tl.float32)
        best_left_out = tl.zeros((ROWS,), dtype=tl.float32)
        for nth in tl.static_range(K + 1):
            _, best = tl.max(left, axis=1, return_indices=True)
            is_best = columns[None, :] == best[:, None]
            value = tl.sum(tl.where(is_best, noisy, 0.0), axis=1)
            tl.store(expert_ptr + rows * (K + 1) + nth, best, mask=is_row)
            left = tl.where(is_best, -(2**31), left)
            top = tl.where(kept[None, :] == nth, value[:, None], top)
            if nth < K:
                is_chosen = is_chosen | is_best
                worst_kept = value
            else:
                best_left_out = value
        top = tl.where(kept[None, :] < K, top, -float("inf"))
        share = tl.exp(top - tl.max(top, axis=1)[:, None])
        share = share / tl.sum(share, axis=1)[:, None]
        weight_place_ptr = weight_ptr + rows[:, None] * K + kept[None, :]
        tl.store(weight_place_ptr, share, mask=is_row[:, None] & (kept < K)[None, :])
        threshold = tl.where(is_chosen, best_left_out[:, None], worst_kept[:, None])
        above = (clean - threshold) / tl.maximum(std, _SMALLEST_STD)
        in_topk = 0.5 + 0.5 * tl.erf(above * 0.7071067811865476)
        is_counted = is_used[:, None] & is_column[None, :]
        load += tl.sum(tl.where(is_counted, in_topk, 0.0), axis=0)
        z, share_of_all = _softmax(clean, is_column)
        probability += tl.sum(tl.where(is_counted, share_of_all, 0.0), axis=0)
        z_sum += tl.where(is_used, z * z, 0.0)
    sums = tl.program_id(0) * num_experts + columns
    tl.store(load_ptr + sums, load, mask=is_column)
    tl.store(probability_ptr + sums, probability, mask=is_column)
    tl.store(z_ptr + tl.program_id(0), tl.sum(z_sum, axis=0))


@triton.jit(do_not_specialize=["num_rows", "num_experts", "noise_epsilon"])
def _choice_gradient_kernel(
    grad_load_ptr,
    grad_probability_ptr,
    grad_z_ptr,
    logits_ptr,
    noise_ptr,
    group_ptr,
    expert_ptr,
    grad_top_ptr,
    grad_logits_ptr,
    grad_noise_ptr,
    num_rows,
    num_experts,
    noise_epsilon,
    GROUPED: tl.constexpr,
    OF_LOAD: tl.constexpr,
    OF_PROBABILITY: tl.constexpr,
    OF_Z: tl.constexpr,
    OF_NOISE: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    is_column = columns < num_experts
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows, is_row, is_used = _rows(tile, group_ptr, num_rows, GROUPED, ROWS)
        clean, raw_std, noise = _load(logits_ptr, noise_ptr, rows, is_row, columns, num_experts)
        std = _softplus(raw_std) + noise_epsilon
        is_counted = is_used[:, None] & is_column[None, :]
        grad = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        grad_std = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        grad_worst_kept = tl.zeros((ROWS,), dtype=tl.float32)
        grad_best_left_out = tl.zeros((ROWS,), dtype=tl.float32)
        if OF_LOAD:
            noisy = clean + noise * std
            is_chosen = tl.zeros((ROWS, COLUMNS), dtype=tl.int1)
            worst_kept = tl.zeros((ROWS,), dtype=tl.float32)
            best_left_out = tl.zeros((ROWS,), dtype=tl.float32)
            for nth in tl.static_range(K + 1):
                best = tl.load(expert_ptr + rows * (K + 1) + nth, mask=is_row, other=0)
                is_best = columns[None, :] == best[:, None]
                if nth < K:
                    is_chosen = is_chosen | is_best
                if nth == K - 1:
                    worst_kept = tl.sum(tl.where(is_best, noisy, 0.0), axis=1)
                if nth == K:
                    best_left_out = tl.sum(tl.where(is_best, noisy, 0.0), axis=1)
            safe_std = tl.maximum(std, _SMALLEST_STD)
            threshold = tl.where(is_chosen, best_left_out[:, None], worst_kept[:, None])
            above = (clean - threshold) / safe_std
            density = 0.3989422804014327 * tl.exp(-0.5 * above * above)
            grad_load = tl.load(grad_load_ptr + columns, mask=is_column, other=0.0)
            through = tl.where(is_counted, density * grad_load[None, :] / safe_std, 0.0)
            grad += through
            grad_std -= tl.where(is_counted & (std >= _SMALLEST_STD), through * above, 0.0)
            grad_best_left_out -= tl.sum(tl.where(is_chosen, through, 0.0), axis=1)
            grad_worst_kept -= tl.sum(tl.where(is_chosen, 0.0, through), axis=1)
        if OF_PROBABILITY or OF_Z:
            z, share_of_all = _softmax(clean, is_column)
            slope = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            if OF_PROBABILITY:
                grad_share = tl.load(grad_probability_ptr + columns, mask=is_column, other=0.0)[None, :]
                slope += grad_share - tl.sum(share_of_all * grad_share, axis=1)[:, None]
            if OF_Z:
                slope += 2.0 * tl.load(grad_z_ptr) * z[:, None]
            grad += tl.where(is_counted, share_of_all * slope, 0.0)
        grad_noise = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for nth in tl.static_range(K + 1):
            best = tl.load(expert_ptr + rows * (K + 1) + nth, mask=is_row, other=0)
            grad_top = tl.load(grad_top_ptr + rows * (K + 1) + nth, mask=is_row, other=0.0)
            if nth == K - 1:
                grad_top += grad_worst_kept
            if nth == K:
                grad_top += grad_best_left_out
            is_best = columns[None, :] == best[:, None]
            grad += tl.where(is_best, grad_top[:, None], 0.0)
            grad_std += tl.where(is_best, grad_top[:, None] * noise, 0.0)
            if OF_NOISE:
                grad_noise += tl.where(is_best, grad_top[:, None] * std, 0.0)
        tail = tl.exp(-tl.abs(raw_std))
        grad_raw_std = grad_std * tl.where(raw_std < 0.0, tail, 1.0) / (1.0 + tail)
        is_place = is_row[:, None] & is_column[None, :]
        place_ptr = grad_logits_ptr + rows[:, None] * (2 * num_experts) + columns[None, :]
        tl.store(place_ptr, grad, mask=is_place)
        tl.store(place_ptr + num_experts, grad_raw_std, mask=is_place)
        if OF_NOISE:
            noise_place_ptr = grad_noise_ptr + rows[:, None] * num_experts + columns[None, :]
            tl.store(noise_place_ptr, grad_noise, mask=is_place)


@triton.jit
def _rows(tile, group_ptr, num_rows, GROUPED: tl.constexpr, ROWS: tl.constexpr):
    """The rows of a tile, int64; whether they exist; whether they are in the sums."""
    rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < num_rows
    is_used = is_row
    if GROUPED:
        is_used = tl.load(group_ptr + rows, mask=is_row, other=1) == 0
    return rows, is_row, is_used


@triton.jit
def _load(logits_ptr, noise_ptr, rows, is_row, columns, num_experts):
    """Clean logits, those of the noise, and its draws; 0 where there are none."""
    is_place = is_row[:, None] & (columns < num_experts)[None, :]
    place_ptr = logits_ptr + rows[:, None] * (2 * num_experts) + columns[None, :]
    clean = tl.load(place_ptr, mask=is_place, other=0.0)
    raw_std = tl.load(place_ptr + num_experts, mask=is_place, other=0.0)
    noise_place_ptr = noise_ptr + rows[:, None] * num_experts + columns[None, :]
    return clean, raw_std, tl.load(noise_place_ptr, mask=is_place, other=0.0)


@triton.jit
def _softmax(clean, is_column):
    """The logarithm of the sum of each row's exponentials, and their shares of it."""
    clean = tl.where(is_column[None, :], clean, -float("inf"))
    largest = tl.max(clean, axis=1)
    z = largest + tl.log(tl.sum(tl.exp(clean - largest[:, None]), axis=1))
    return z, tl.exp(clean - z[:, None])


@triton.jit
def _ordered(value):
    """Integers above -2^31 in the order of the numbers; NaN is above infinity, as torch has it."""
    bits = tl.where(value == value, value, float("nan")).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    negative = tl.where(value == value, value.to(tl.int32, bitcast=True) < 0, False)
    return tl.where(negative, -bits, bits)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact to a few units in the last place where it is small, too."""
    tail = tl.exp(-tl.abs(x))
    sum = 1.0 + tail
    # log(1 + tail): the quotient makes up for what the sum has rounded away.
    log = tl.where(sum == 1.0, tail, tl.log(sum) * (tail / tl.where(sum == 1.0, 1.0, sum - 1.0)))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log


# Of one group, in float32, and few enough experts for registers.
noisy_choice = by_operator(_forward, _backward)
