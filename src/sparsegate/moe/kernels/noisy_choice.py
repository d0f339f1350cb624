"""The choice of noisy top-k gating, and what the balance losses ask about it (eq. 3 to 5 and 8 to 10).

`equations` is how it reads. Operators do the same with small temporaries: `threaded_choice` on the CPU,
`triton/noisy_choice.py` on GPUs. What they share is here: `by_operator`.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import LogitSums, sum_by_group, sums_of_logits
from .higher_order import gradients_through

# Where softplus underflows, the quotient of eq. 9 and its gradient must stay finite: P is then 0 or 1.
SMALLEST_STD = 1e-12


class Choice(NamedTuple):
    """The choice of N rows among the B experts of their groups, and sums over the rows of each of A groups.

    expert_NK: int64, the best expert first. weight_NK: G(x) of these. logit_sums: without noise. load_AB: sum
    of P(x, i) of eq. 8, a smooth estimate of how many rows chose each expert; None where there is none.
    """

    expert_NK: Tensor
    weight_NK: Tensor
    logit_sums: LogitSums
    load_AB: Tensor | None


class NoisyChoiceKernel(Protocol):
    """The function that every way to compute it is; `equations` tells its arguments."""

    def __call__(
        self,
        logits_NS: Tensor,
        noise_NB: Tensor,
        group_N: Tensor | None,
        *,
        num_groups: int,
        k: int,
        noise_epsilon: float,
    ) -> Choice: ...


def equations(
    logits_NS: Tensor,
    noise_NB: Tensor,
    group_N: Tensor | None,
    *,
    num_groups: int,
    k: int,
    noise_epsilon: float,
    chosen_NK1: Tensor | None = None,
) -> Choice:
    """Choose k < B experts for each row by clean + noise * (softplus(x W_noise) + noise_epsilon).

    logits_NS: x W_gate, the clean logits, and beside them x W_noise. noise_NB: standard normal. group_N:
    int64, the group of each row, num_groups for rows that are in no sum and whose choice means nothing; None
    where there is one group and every row is in it. chosen_NK1: the k + 1 best experts, the best one first,
    where they are known: among equals they are not to be found again.
    """
    clean_NB, raw_std_NB = logits_NS.chunk(2, dim=1)
    std_NB = F.softplus(raw_std_NB) + noise_epsilon
    # One value more than is kept: the load estimate needs the best value that is left out.
    noisy_NB = clean_NB + noise_NB * std_NB
    if chosen_NK1 is None:
        top_NK1, expert_NK1 = noisy_NB.topk(k + 1, dim=-1)
    else:
        top_NK1, expert_NK1 = noisy_NB.gather(1, chosen_NK1), chosen_NK1
    expert_NK = expert_NK1[:, :k]
    p_NB = probability_in_topk(clean_NB, std_NB, top_NK1, expert_NK)
    return Choice(
        expert_NK=expert_NK,
        weight_NK=top_NK1[:, :k].softmax(dim=-1),
        logit_sums=sums_of_logits(clean_NB, group_N, num_groups=num_groups),
        load_AB=sum_by_group(p_NB, group_N, num_groups=num_groups),
    )


def probability_in_topk(clean_TE: Tensor, std_TE: Tensor, top_TK1: Tensor, chosen_TK: Tensor) -> Tensor:
    """P(x, i) of eq. 8 and 9: the probability that expert i is among the k best if only its noise is redrawn.

    clean_TE: logits without noise. std_TE: standard deviation of the noise. top_TK1: the k + 1 largest noisy
    logits in descending order. chosen_TK: the experts of the first k. Returns [T, E].

    The threshold is the k-th largest noisy logit among the *other* experts: the (k+1)-th of all for a chosen
    expert, the k-th for the rest. Membership goes by index, since comparing values would miscount ties.
    """
    best_left_out_T1, worst_kept_T1 = top_TK1[:, -1:], top_TK1[:, -2:-1]
    chosen_TE = torch.zeros_like(clean_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    threshold_TE = torch.where(chosen_TE, best_left_out_T1, worst_kept_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE.clamp_min(SMALLEST_STD))


def by_operator(forward: Any, backward: Any) -> NoisyChoiceKernel:
    """The choice by an operator whose own backward pass is another one: both get what torch asks of them.

    forward: what `NoisyChoiceKernel` takes, in that order; returns the weights of k experts for each row, the
    sums of the load, of the softmax, of the squared log-sum-exp, and the k + 1 best experts. backward: the
    gradients of the first four, None where nothing depends on one; the three inputs, the experts and the
    weights; num_groups, noise_epsilon, and whether the noise needs a gradient. It returns the gradients of
    logits and noise. Second derivatives take the way of the equations.
    """
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(partial(_autograd_backward, backward), setup_context=_setup_context)

    def choose(
        logits_NS: Tensor,
        noise_NB: Tensor,
        group_N: Tensor | None,
        *,
        num_groups: int,
        k: int,
        noise_epsilon: float,
    ) -> Choice:
        weight_NK, load_AB, probability_AB, z, expert_NK1 = forward(
            logits_NS, noise_NB, group_N, num_groups, k, noise_epsilon
        )
        return Choice(expert_NK1[:, :k], weight_NK, LogitSums(probability_AB, z), load_AB)

    return choose


def _fake_forward(
    logits_NS: Tensor, noise_NB: Tensor, group_N: Tensor | None, num_groups: int, k: int, noise_epsilon: float
) -> tuple[Tensor, ...]:
    num_rows, num_experts = noise_NB.shape
    return (
        logits_NS.new_empty(num_rows, k),
        logits_NS.new_empty(num_groups, num_experts),
        logits_NS.new_empty(num_groups, num_experts),
        logits_NS.new_empty(()),
        logits_NS.new_empty(num_rows, k + 1, dtype=torch.int64),
    )


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    *_, logits_NS, noise_NB, _, _, _, _, _, needs_noise = inputs
    num_rows, num_experts = noise_NB.shape
    return (
        logits_NS.new_empty(num_rows, 2 * num_experts),
        noise_NB.new_empty(num_rows if needs_noise else 0, num_experts),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_NS, noise_NB, group_N, ctx.num_groups, ctx.k, ctx.noise_epsilon = inputs
    ctx.save_for_backward(logits_NS, noise_NB, group_N, output[0], output[4])
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)


def _autograd_backward(backward: Any, ctx: Any, *all_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *grads, _ = all_grads
    logits_NS, noise_NB, group_N, weight_NK, expert_NK1 = ctx.saved_tensors
    needs, rest = ctx.needs_input_grad[:2], (None,) * 4
    if not torch.is_grad_enabled():
        found = backward(
            *grads,
            logits_NS,
            noise_NB,
            group_N,
            expert_NK1,
            weight_NK,
            ctx.num_groups,
            ctx.noise_epsilon,
            needs[1],
        )
        return *(grad if needed else None for grad, needed in zip(found, needs, strict=True)), *rest

    # Derivatives of this backward are wanted: by operators that have them.
    def function(logits_NS: Tensor, noise_NB: Tensor) -> tuple[Tensor | None, ...]:
        choice = equations(
            logits_NS,
            noise_NB,
            group_N,
            num_groups=ctx.num_groups,
            k=ctx.k,
            noise_epsilon=ctx.noise_epsilon,
            chosen_NK1=expert_NK1,
        )
        return choice.weight_NK, choice.load_AB, *choice.logit_sums

    return *gradients_through(function, (logits_NS, noise_NB), needs, grads), *rest
