"""A config that cannot be built is refused in one line that names the field, its value and the cure."""

from dataclasses import FrozenInstanceError, replace

import pytest

from sparsegate.models.gates import (
    BalancedGate,
    ExpertChoiceGate,
    HierarchicalGate,
    NoisyTopKGate,
    SigmoidTopKGate,
    SoftmaxGate,
    SoftmaxTopKGate,
)
from tests.helpers.model_cases import CONFIGS


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("recurrent", {"vocab_size": 0}, r"model.vocab-size \(0\) must be at least 1"),
        ("recurrent", {"width": 0}, r"model.width \(0\) must be at least 1"),
        ("recurrent", {"lstm_units": -1}, r"model.lstm-units \(-1\) must be at least 1"),
        (
            "recurrent",
            {"softmax_samples": -1},
            r"model.softmax-samples \(-1\) must be at least 1, or 0 for all words",
        ),
        (
            "recurrent",
            {"softmax_samples": 4, "softmax_cutoffs": (3,)},
            r"model.softmax-samples \(4\) must be 0 with model.softmax-cutoffs, .*",
        ),
        ("recurrent", {"num_layers": 0}, r"model.num-layers \(0\) must be at least 1"),
        ("recurrent", {"dropout": 1.0}, r"model.dropout \(1.0\) must be at least 0 and below 1"),
        ("recurrent", {"dropout": -0.1}, r"model.dropout \(-0.1\) must be at least 0 and below 1"),
        ("recurrent", {"dropout": float("nan")}, r"model.dropout \(nan\) must be at least 0 and below 1"),
        (
            "recurrent",
            {"lstm_units": 8},
            r"model.width \(6\) must equal the LSTMs' output \(8\), for the residual connections; "
            r"set model.lstm-projection 6 or model.lstm-units 6",
        ),
        (
            "recurrent",
            {"lstm_projection": 7},
            r"model.lstm-projection \(7\) must be .* model.lstm-units \(6\).*",
        ),
        ("projected", {"lstm_projection": -6}, r"model.lstm-projection \(-6\) must be at least 0 .*"),
        ("mixture", {"k": 6}, r"model.k \(6\) must be between 1 and model.num-experts \(5\)"),
        ("mixture", {"k": 0}, r"model.k \(0\) must be between 1 and model.num-experts \(5\)"),
        ("mixture", {"hidden": 0}, r"model.hidden \(0\) must be at least 1"),
        ("mixture", {"capacity": 0.9}, r"model.capacity \(0.9\) must be at least 1, or none; below 1, .*"),
        ("mixture", {"capacity": float("nan")}, r"model.capacity \(nan\) must be at least 1, or none; .*"),
        (
            "mixture",
            {"gate": SoftmaxGate()},
            r"model.k \(2\) must equal model.num-experts \(5\) with model.gate.kind softmax, .*",
        ),
        (
            "mixture",
            {"gate": BalancedGate(most_per_token=6)},
            r"model.gate.most-per-token \(6\) must be between 1 and model.num-experts \(5\), or none",
        ),
        (
            "mixture",
            {"gate": HierarchicalGate(num_groups=2)},
            r"model.gate.num-groups \(2\) must divide model.num-experts \(5\)",
        ),
        (
            "mixture",
            {"gate": HierarchicalGate(num_groups=5, k_primary=3)},
            r"model.gate.k-primary \(3\) must be between 1 and model.gate.num-groups \(5\), and divide "
            r"model.k \(2\)",
        ),
        (
            "mixture",
            {"gate": HierarchicalGate(num_groups=5, k_primary=1)},
            r"model.k \(2\) must be at most model.gate.k-primary \(1\) times the experts of a group \(1\)",
        ),
        (
            "mixture",
            {"gate": HierarchicalGate(num_groups=5, k_primary=2, primary="balanced", most_groups=6)},
            r"model.gate.most-groups \(6\) must be between 1 and model.gate.num-groups \(5\), or none",
        ),
        (
            "mixture",
            {"gate": HierarchicalGate(num_groups=1, k_primary=1, secondary="balanced", most_per_group=0)},
            r"model.gate.most-per-group \(0\) must be between 1 and the experts of a group \(5\), or none",
        ),
        (
            "mixture",
            {"gate": HierarchicalGate(num_groups=1, k_primary=1, primary="balanced", most_per_group=2)},
            r"model.gate.most-per-group \(2\) is of a balanced level; set model.gate.secondary to .*",
        ),
        (
            "mixture",
            {"gate": HierarchicalGate(num_groups=1, k_primary=1, secondary="balanced", most_groups=1)},
            r"model.gate.most-groups \(1\) is of a balanced level; set model.gate.primary to balanced, or .*",
        ),
        ("feed_forward", {"hidden": ()}, r"model.hidden \(\(\)\) must name at least one layer .*"),
        ("feed_forward", {"hidden": (4, 0)}, r"model.hidden \(\(4, 0\)\) must name at least one layer .*"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_in_one_line(kind, change, message):
    with pytest.raises(ValueError, match=f"^{message}$") as refusal:
        replace(CONFIGS[kind], **change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("gate", "wrong", "message"),
    [
        (NoisyTopKGate, {"noise_epsilon": -1.0}, r"model.gate.noise-epsilon \(-1.0\) must be at least 0"),
        (HierarchicalGate, {"noise_epsilon": -1.0}, r"model.gate.noise-epsilon \(-1.0\) must be at least 0"),
        (BalancedGate, {"scope": 0}, r"model.gate.scope \(0\) must be at least 1 token, or none"),
        (ExpertChoiceGate, {"scope": -2}, r"model.gate.scope \(-2\) must be at least 1 token, or none"),
        (SoftmaxTopKGate, {"jitter": 1.0}, r"model.gate.jitter \(1.0\) must be at least 0 and below 1"),
        (SigmoidTopKGate, {"bias_rate": -0.1}, r"model.gate.bias-rate \(-0.1\) must be at least 0"),
        (
            HierarchicalGate,
            {"scope": 4},
            r"model.gate.scope \(4\) is of balanced levels; set model.gate.primary .*",
        ),
    ],
)
def test_a_gate_that_cannot_be_built_is_refused_in_one_line(gate, wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(CONFIGS["mixture"], gate=gate(**wrong))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_a_value_that_cannot_be_changed(kind):
    config = CONFIGS[kind]
    assert replace(config) == config
    with pytest.raises(FrozenInstanceError):
        config.width = 3
