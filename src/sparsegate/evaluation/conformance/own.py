"""sparsegate's own layer, shown to the suite: the example to follow for others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...moe.experts.feed_forward import FeedForward
from ...moe.gating.noisy_topk import NoisyTopK
from ...moe.layer import MoE
from ...moe.losses import importance_loss, load_loss
from .implementation import Implementation


def noisy_topk(
    *, width: int = 16, hidden: int = 24, num_experts: int = 6, k: int = 2, noise_epsilon: float = 0.0
) -> Implementation:
    """`MoE.noisy_topk`, small unless told otherwise."""
    gate = NoisyTopK(width=width, num_experts=num_experts, k=k, noise_epsilon=noise_epsilon)
    experts = FeedForward(width=width, hidden=hidden, num_experts=num_experts)
    moe = MoE(gate=gate, experts=experts)

    def gates(x_TD: Tensor, mask_T: Tensor | None, noise_TE: Tensor | None) -> Tensor:
        found = gate(x_TD, mask_T, noise_TE)
        # One column more, for the pairs of padding.
        gate_TE1 = found.weight_N.new_zeros(len(x_TD), num_experts + 1)
        return gate_TE1.index_put((found.token_N, found.expert_N), found.weight_N)[:, :num_experts]

    @torch.no_grad()
    def swap(permutation: Sequence[int]) -> None:
        for stacked in (experts.w_in, experts.w_out):
            stacked.copy_(stacked[list(permutation)])
        for columns in (gate.w_gate, gate.w_noise):
            columns.copy_(columns[:, list(permutation)])

    return Implementation(
        module=moe,
        width=width,
        num_experts=num_experts,
        k=k,
        forward=lambda x_TD, mask_T, noise_TE: moe(x_TD, mask_T, noise_TE)[0],
        takes_mask=True,
        takes_noise=True,
        gates=gates,
        logits=lambda x_TD: x_TD @ gate.w_gate,
        noise_std=lambda x_TD: F.softplus(x_TD @ gate.w_noise) + noise_epsilon,
        noise_epsilon=noise_epsilon,
        load=lambda x_TD, mask_T, noise_TE: gate(x_TD, mask_T, noise_TE).sums.load_E,
        importance_loss=lambda x_TD, mask_T, noise_TE: importance_loss(gate(x_TD, mask_T, noise_TE)),
        load_loss=lambda x_TD, mask_T, noise_TE: load_loss(gate(x_TD, mask_T, noise_TE)),
        expert=lambda index, rows_RD: F.relu(rows_RD @ experts.w_in[index]) @ experts.w_out[index],
        swap=swap,
    )
