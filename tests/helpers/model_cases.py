"""Small language models of every kind, and the paper's formulas for what they are made of."""

from dataclasses import replace

import torch
from torch import Tensor

from sparsegate.models import FeedForwardLM, LanguageModel, LanguageModelConfig, MixtureLM, RecurrentLM, build
from sparsegate.models.gates import (
    BalancedGate,
    ExpertChoiceGate,
    GateConfig,
    HierarchicalGate,
    NoisyTopKGate,
    SigmoidTopKGate,
    SoftmaxGate,
    SoftmaxTopKGate,
)

VOCAB_SIZE = 11
WIDTH = 6

_COMMON = {"vocab_size": VOCAB_SIZE, "width": WIDTH, "lstm_units": WIDTH, "dropout": 0.0}

CONFIGS: dict[str, LanguageModelConfig] = {
    "mixture": MixtureLM(**_COMMON, num_experts=5, k=2, hidden=4),
    "feed_forward": FeedForwardLM(**_COMMON, hidden=(5, 3)),
    "recurrent": RecurrentLM(**_COMMON, num_layers=3),
    "projected": RecurrentLM(**(_COMMON | {"lstm_units": 9, "lstm_projection": WIDTH}), num_layers=2),
    "biased": RecurrentLM(**_COMMON, lstm_bias=True, num_layers=1),
}

# Gates over six experts; those that choose over a batch do so within sequences of five tokens.
GATES: dict[str, GateConfig] = {
    "noisy_topk": NoisyTopKGate(),
    "hierarchical": HierarchicalGate(num_groups=3, noise_epsilon=0.01),
    "balanced_hierarchy": HierarchicalGate(
        num_groups=3, primary="balanced", secondary="balanced", scope=5, most_groups=2, most_per_group=1
    ),
    "balanced": BalancedGate(scope=5, most_per_token=3),
    "expert_choice": ExpertChoiceGate(scope=5),
    "softmax": SoftmaxGate(),
    "softmax_topk": SoftmaxTopKGate(renormalize=False, jitter=0.01),
    "sigmoid_topk": SigmoidTopKGate(bias_rate=0.5),
}


def with_gate(config: MixtureLM, name: str) -> MixtureLM:
    """The mixture with six experts and the gate of that name."""
    return replace(config, num_experts=6, k=6 if name == "softmax" else 2, gate=GATES[name])


def a_model(config: LanguageModelConfig) -> LanguageModel:
    """In float64, its gate's weights not zero, as after some training."""
    model = build(config, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def lstm(cell: torch.nn.LSTM, x_BSD: Tensor) -> Tensor:
    """The recurrence as it reads, gates in torch's order: input, forget, cell, output."""
    units, projected = cell.hidden_size, cell.proj_size > 0
    h_BD = x_BSD.new_zeros(len(x_BSD), cell.proj_size or units)
    c_BU = x_BSD.new_zeros(len(x_BSD), units)
    outputs = []
    for x_BD in x_BSD.unbind(dim=1):
        z = x_BD @ cell.weight_ih_l0.T + h_BD @ cell.weight_hh_l0.T
        if cell.bias:
            z = z + cell.bias_ih_l0 + cell.bias_hh_l0
        i, f, g, o = z.split(units, dim=1)
        c_BU = f.sigmoid() * c_BU + i.sigmoid() * g.tanh()
        h_BD = o.sigmoid() * c_BU.tanh()
        if projected:
            h_BD = h_BD @ cell.weight_hr_l0.T
        outputs.append(h_BD)
    return torch.stack(outputs, dim=1)
