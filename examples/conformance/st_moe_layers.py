"""Adapters for the layer of the package `st-moe-pytorch`: top-n gating with a capacity, as in ST-MoE.

pip install st-moe-pytorch
cd examples/conformance
sparsegate conform st_moe_layers:as_it_comes
"""

import torch
from st_moe_pytorch import MoE

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
        threshold_train=0.0,
        threshold_eval=0.0,
        capacity_factor_train=NUM_EXPERTS,
        capacity_factor_eval=NUM_EXPERTS,
        straight_through_dispatch_tensor=False,
    )
    return adapt(moe)


def straight_through() -> Implementation:
    """The same, with the gradient of dispatch passed to the gate, which is the default."""
    implementation = nothing_dropped()
    implementation.module.gate.straight_through_dispatch_tensor = True
    return implementation


def adapt(moe: MoE) -> Implementation:
    def gates(x_TD, mask_T, noise_TE):
        _, combine_1TEC, _, _ = moe.gate(x_TD[None])
        return combine_1TEC.sum(dim=-1)[0]

    @torch.no_grad()
    def swap(permutation):
        columns = moe.gate.to_gates.weight
        columns.copy_(columns[permutation])
        states = [{k: v.clone() for k, v in e.state_dict().items()} for e in moe.experts.experts]
        for expert, index in zip(moe.experts.experts, permutation, strict=True):
            expert.load_state_dict(states[index])

    return Implementation(
        module=moe,
        width=WIDTH,
        num_experts=NUM_EXPERTS,
        k=2,
        gates=gates,
        logits=moe.gate.to_gates,
        expert=lambda index, rows_RD: moe.experts.experts[index](rows_RD),
        swap=swap,
    )
