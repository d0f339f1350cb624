"""The models of the paper's table 7: parameters and multiply-adds, and the names in their checkpoints."""

from dataclasses import fields, replace

import pytest
import torch

from sparsegate import (
    Balanced,
    BalancedGroups,
    Capacity,
    ExpertChoice,
    Hierarchical,
    NoisyTopK,
    NoisyTopKGroups,
    SigmoidTopK,
    Softmax,
    SoftmaxTopK,
    SwiGLU,
)
from sparsegate.models import FeedForwardLM, MixtureLM, RecurrentLM, build
from sparsegate.models.gates import NoisyTopKGate
from sparsegate.models.holding import Everything
from tests.helpers.model_cases import CONFIGS, GATES, WIDTH, with_gate

VOCAB_SIZE = 793_471
PAPER = {"vocab_size": VOCAB_SIZE, "width": 512, "lstm_units": 512, "dropout": 0.1}


def mixture(num_experts: int) -> MixtureLM:
    return MixtureLM(**PAPER, num_experts=num_experts, k=4, hidden=1024)


MODELS = {
    "moe-4": mixture(4),
    "moe-32": mixture(32),
    "moe-256": mixture(256),
    "4xlstm-512": RecurrentLM(**PAPER, num_layers=4),
    "moe-1-wide": FeedForwardLM(**PAPER, hidden=(4096,)),
    "moe-1-deep": FeedForwardLM(**PAPER, hidden=(1024,) * 4),
    "lstm-2048-512": RecurrentLM(**(PAPER | {"lstm_units": 2048, "lstm_projection": 512}), num_layers=1),
}
LSTM = 8 * 512 * 512  # four gates, from the input and from the output before
EXPERT = 2 * 512 * 1024


def gate(num_experts: int) -> int:
    """Both w_gate and w_noise."""
    return 2 * 512 * num_experts


# Parameters without embedding and softmax, and multiply-adds per timestep, by the formulas of section 5.1.
EXACT = {
    "moe-4": (2 * LSTM + 4 * EXPERT + gate(4), 2 * LSTM + 4 * EXPERT + gate(4)),
    "moe-32": (2 * LSTM + 32 * EXPERT + gate(32), 2 * LSTM + 4 * EXPERT + gate(32)),
    "moe-256": (2 * LSTM + 256 * EXPERT + gate(256), 2 * LSTM + 4 * EXPERT + gate(256)),
    "4xlstm-512": (4 * LSTM, 4 * LSTM),
    "moe-1-wide": (2 * LSTM + 2 * 512 * 4096, 2 * LSTM + 2 * 512 * 4096),
    "moe-1-deep": (2 * LSTM + EXPERT + 3 * 1024**2, 2 * LSTM + EXPERT + 3 * 1024**2),
    "lstm-2048-512": (4 * 1024 * 2048 + 2048 * 512, 4 * 1024 * 2048 + 2048 * 512),
}
# As printed: millions of parameters, millions of multiply-adds, billions of parameters in all.
PRINTED = {
    "moe-4": (8.4, 8.4, 0.8),
    "moe-32": (37.8, 8.4, 0.9),
    "moe-256": (272.9, 8.6, 1.1),
    "4xlstm-512": (8.4, 8.4, 0.8),
    "moe-1-wide": (8.4, 8.4, 0.8),
    "moe-1-deep": (8.4, 8.4, 0.8),
    "lstm-2048-512": (9.4, 9.4, 0.8),
}


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_multiply_adds_are_those_of_table_7(name):
    model = build(MODELS[name], device="meta")
    counted = num_parameters(model.layers), model.ops_per_token()
    assert counted == EXACT[name]
    parameters, ops, total = PRINTED[name]
    assert round(counted[0] / 1e6, 1) == parameters
    assert round(num_parameters(model) / 1e9, 1) == total
    if name == "moe-256":
        assert counted[1] == 8_650_752  # the one cell that is misprinted: 8.65, and the table has 8.6
    else:
        assert round(counted[1] / 1e6, 1) == ops


@pytest.mark.parametrize("name", MODELS)
def test_embedding_and_softmax_are_two_tables(name):
    model = build(MODELS[name], device="meta")
    table, bias = VOCAB_SIZE * 512, VOCAB_SIZE
    assert num_parameters(model.embedding) == model.softmax.ops_per_token() == table
    assert num_parameters(model) == 2 * table + bias + EXACT[name][0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_is_allocated_on_the_meta_device(kind):
    assert {p.device.type for p in build(CONFIGS[kind], device="meta").parameters()} == {"meta"}


def test_experts_are_made_on_a_device_of_their_own():
    model = build(CONFIGS["mixture"], device="cpu", holding=Everything(experts_on=torch.device("meta")))
    experts = set(model.expert_parameters())
    assert experts
    assert {(p in experts, p.device.type) for p in model.parameters()} == {(True, "meta"), (False, "cpu")}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_vocabulary_of_no_more_words_than_samples_is_trained_whole(kind):
    words = CONFIGS[kind].vocab_size
    for samples, sampled in ((4, 4), (words - 1, words - 1), (words, 0), (words + 1, 0)):
        config = replace(CONFIGS[kind], softmax_samples=samples)
        assert config.sampled_words == build(config, device="meta").softmax.num_samples == sampled


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_has_the_dtype_that_was_asked_for(kind):
    model = build(CONFIGS[kind], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_seed_builds_the_same_model(kind):
    torch.manual_seed(1)
    first = build(CONFIGS[kind]).state_dict()
    torch.manual_seed(1)
    second = build(CONFIGS[kind]).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_names_in_a_checkpoint_are_those_of_the_layers():
    names = list(build(CONFIGS["mixture"]).state_dict())
    assert names == [
        "embedding.weight",
        "layers.lstm1.lstm.weight_ih_l0",
        "layers.lstm1.lstm.weight_hh_l0",
        "layers.moe.moe.gate.w_gate",
        "layers.moe.moe.gate.w_noise",
        "layers.moe.moe.experts.w_in",
        "layers.moe.moe.experts.w_out",
        "layers.lstm2.lstm.weight_ih_l0",
        "layers.lstm2.lstm.weight_hh_l0",
        "softmax.weight",
        "softmax.bias",
    ]
    assert list(build(CONFIGS["feed_forward"]).layers) == ["lstm1", "dense", "lstm2"]
    assert list(build(CONFIGS["recurrent"]).layers) == ["lstm1", "lstm2", "lstm3"]


def test_what_the_config_says_reaches_the_layers():
    model = build(replace(CONFIGS["mixture"], dropout=0.3, gate=NoisyTopKGate(noise_epsilon=0.01), k=3))
    gate = model.layers["moe"].moe.gate
    assert (gate.pairs_per_token, gate.noise_epsilon, gate.num_experts) == (3, 0.01, 5)
    assert model.dropout.p == 0.3
    assert model.noise_widths() == {"moe": 5}
    assert build(CONFIGS["recurrent"]).noise_widths() == {}
    assert build(CONFIGS["projected"]).layers["lstm1"].lstm.proj_size == WIDTH


CLASSES = {
    "noisy_topk": NoisyTopK,
    "hierarchical": Hierarchical,
    "balanced_hierarchy": Hierarchical,
    "balanced": Balanced,
    "expert_choice": ExpertChoice,
    "softmax": Softmax,
    "softmax_topk": SoftmaxTopK,
    "sigmoid_topk": SigmoidTopK,
}


def a_mixture(gate, **changes):
    return build(replace(with_gate(CONFIGS["mixture"], gate), **changes))


@pytest.mark.parametrize("name", GATES)
def test_a_mixture_has_the_gate_that_its_config_names(name):
    config, gate = GATES[name], a_mixture(name).layers["moe"].moe.gate
    assert type(gate) is CLASSES[name]
    assert gate.num_experts == 6
    assert gate.pairs_per_token == (6 if name == "softmax" else 2)
    if name == "balanced_hierarchy":
        assert (type(gate.primary), type(gate.secondary)) == (Balanced, BalancedGroups)
        assert (gate.primary.scope, gate.secondary.scope) == (5, 5)
        assert (gate.primary.most_per_token, gate.secondary.most_per_token) == (2, 1)
    elif name == "hierarchical":
        assert (type(gate.primary), type(gate.secondary)) == (NoisyTopK, NoisyTopKGroups)
        assert gate.primary.noise_epsilon == gate.secondary.noise_epsilon == config.noise_epsilon
    else:
        for field in fields(config):
            assert field.name == "kind" or getattr(gate, field.name) == getattr(config, field.name)


@pytest.mark.parametrize("name", GATES)
def test_a_capacity_is_a_bound_on_any_gate(name):
    model = a_mixture(name, capacity=1.5, drop="lightest")
    gate = model.layers["moe"].moe.gate
    assert type(gate) is Capacity
    assert (gate.factor, gate.drop) == (1.5, "lightest")
    assert type(gate.gate) is CLASSES[name]
    assert model.sees_later_tokens()


def test_experts_may_be_swiglu():
    assert type(a_mixture("noisy_topk", experts="swiglu").layers["moe"].moe.experts) is SwiGLU


def test_a_step_reaches_the_gates():
    model = a_mixture("sigmoid_topk")
    routings = model(torch.randint(5, (2, 7))).routings
    model.after_step({name: routing.sums for name, routing in routings.items()})
    assert set(model.layers["moe"].moe.gate.bias.tolist()) <= {-0.5, 0.0, 0.5}
    assert model.layers["moe"].moe.gate.bias.any()


def test_a_model_says_whether_tokens_see_later_ones():
    assert not a_mixture("noisy_topk").sees_later_tokens()
    balanced = a_mixture("balanced")
    assert balanced.sees_later_tokens()
    assert not balanced.eval().sees_later_tokens()
    assert a_mixture("expert_choice").eval().sees_later_tokens()
    assert not a_mixture("noisy_topk", capacity=1.0).sees_later_tokens()
    assert a_mixture("noisy_topk", capacity=1.0, drop="lightest").sees_later_tokens()
