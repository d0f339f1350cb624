"""Adapters for the layer of the package `mixture-of-experts`: GShard's top-2 gating with a capacity.

pip install mixture-of-experts
cd examples/conformance
sparsegate conform mixture_of_experts_layers:as_it_comes
"""

import torch
from mixture_of_experts import MoE

from sparsegate import Implementation

WIDTH, NUM_EXPERTS = 16, 8


def as_it_comes() -> Implementation:
    """With its defaults: a capacity, and a second expert that is kept at random."""
    return adapt(MoE(dim=WIDTH, num_experts=NUM_EXPERTS))


def nothing_dropped() -> Implementation:
    """With a capacity for every token, and the second expert always kept."""
    moe = MoE(
        dim=WIDTH,
        num_experts=NUM_EXPERTS,
        second_policy_train="all",
        second_policy_eval="all",
        capacity_factor_train=NUM_EXPERTS,
        capacity_factor_eval=NUM_EXPERTS,
    )
    return adapt(moe)


def adapt(moe: MoE) -> Implementation:
    def gates(x_TD, mask_T, noise_TE):
        _, combine_1TEC, _ = moe.gate(x_TD[None])
        return combine_1TEC.sum(dim=-1)[0]

    def expert(index, rows_RD):
        return moe.experts(rows_RD.expand(NUM_EXPERTS, -1, -1))[index]

    @torch.no_grad()
    def swap(permutation):
        moe.gate.w_gating.copy_(moe.gate.w_gating[:, permutation])
        moe.experts.w1.copy_(moe.experts.w1[permutation])
        moe.experts.w2.copy_(moe.experts.w2[permutation])

    return Implementation(
        module=moe,
        width=WIDTH,
        num_experts=NUM_EXPERTS,
        k=2,
        gates=gates,
        logits=lambda x_TD: x_TD @ moe.gate.w_gating,
        expert=expert,
        swap=swap,
    )
