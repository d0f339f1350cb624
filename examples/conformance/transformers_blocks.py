"""Adapters for mixture blocks of `transformers`, made small and at random from a configuration.

pip install transformers
cd examples/conformance
sparsegate conform transformers_blocks:mixtral
"""

import torch
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from sparsegate import Implementation

WIDTH, HIDDEN, NUM_EXPERTS, K = 16, 24, 8, 2


def mixtral(*, router_jitter_noise: float = 0.0) -> Implementation:
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=K,
        router_jitter_noise=router_jitter_noise,
    )
    return adapt_stacked(MixtralSparseMoeBlock(config))


def qwen3_moe() -> Implementation:
    """With the weights of the chosen experts as they come out of the softmax over all, its default."""
    return adapt_stacked(Qwen3MoeSparseMoeBlock(qwen3_config(norm_topk_prob=False)))


def qwen3_moe_normalized() -> Implementation:
    """With `norm_topk_prob`, which the published Qwen3 models set."""
    return adapt_stacked(Qwen3MoeSparseMoeBlock(qwen3_config(norm_topk_prob=True)))


def qwen3_config(*, norm_topk_prob: bool) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=K,
        norm_topk_prob=norm_topk_prob,
    )


def deepseek_v3() -> Implementation:
    """Sigmoid scores, a scale, and a shared expert that every token passes through."""
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=K,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
    )
    return adapt_stacked(DeepseekV3MoE(config))


def adapt_stacked(block: nn.Module) -> Implementation:
    """A block with `gate` and with experts in stacked weights."""
    initialize(block)
    experts = block.experts

    def gates(x_TD, mask_T, noise_TE):
        _, weight_TK, index_TK = block.gate(x_TD)
        return weight_TK.new_zeros(len(x_TD), NUM_EXPERTS).scatter(1, index_TK, weight_TK)

    def expert(index, rows_RD):
        index_R1 = torch.full((len(rows_RD), 1), index)
        return experts(rows_RD, index_R1, rows_RD.new_ones(len(rows_RD), 1))

    @torch.no_grad()
    def swap(permutation):
        for weight in (block.gate.weight, experts.gate_up_proj, experts.down_proj):
            weight.copy_(weight[permutation])

    return Implementation(
        module=block,
        width=WIDTH,
        num_experts=NUM_EXPERTS,
        k=K,
        gates=gates,
        logits=lambda x_TD: block.gate(x_TD)[0],
        expert=expert,
        swap=swap,
    )


def switch() -> Implementation:
    """One expert for each token, weighted with its probability, and a capacity."""
    config = SwitchTransformersConfig(
        d_model=WIDTH, d_ff=HIDDEN, num_experts=NUM_EXPERTS, expert_capacity=16, dropout_rate=0.0
    )
    block = SwitchTransformersSparseMLP(config)
    initialize(block)
    experts = [block.experts[f"expert_{i}"] for i in range(NUM_EXPERTS)]

    def gates(x_TD, mask_T, noise_TE):
        chosen_1TE, weight_1T1, _ = block.router(x_TD[None])
        return (chosen_1TE * weight_1T1)[0]

    @torch.no_grad()
    def swap(permutation):
        columns = block.router.classifier.weight
        columns.copy_(columns[permutation])
        states = [{k: v.clone() for k, v in e.state_dict().items()} for e in experts]
        for expert, index in zip(experts, permutation, strict=True):
            expert.load_state_dict(states[index])

    return Implementation(
        module=block,
        width=WIDTH,
        num_experts=NUM_EXPERTS,
        k=1,
        gates=gates,
        logits=block.router.classifier,
        expert=lambda index, rows_RD: experts[index](rows_RD),
        swap=swap,
    )


def initialize(block: nn.Module) -> None:
    """Weights of a block alone are not initialized; its model would do that."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
