"""A config that cannot be built is refused in one line that names the field, its value and the cure."""

from dataclasses import FrozenInstanceError, replace

import pytest

from sparsegate.models.gates import (
    BalancedGate,
    HierarchicalGate,
    NoisyTopKGate,
    SigmoidTopKGate,
    SoftmaxTopKGate,
)
from sparsegate.models.translation import DenseBlock, Translation
from sparsegate.training.overrides import from_json, options, replace_by_path, to_json
from tests.helpers.translation_models import CONFIGS, MIXTURE, MIXTURES

of_every_kind = pytest.mark.parametrize("kind", CONFIGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, r"model.vocab-size \(0\) must be at least 1"),
        ({"lstm_units": 8}, r"model.width \(6\) must equal the LSTMs' output \(8\), .*"),
        (
            {"encoder_layers": 2},
            r"model.encoder-layers \(2\) must be at least 3 with model.bidirectional true: .*",
        ),
        (
            {"encoder_layers": 1, "bidirectional": False},
            r"model.encoder-layers \(1\) must be at least 2 with model.bidirectional false: .*",
        ),
        ({"decoder_layers": 1}, r"model.decoder-layers \(1\) must be at least 2: .*"),
        ({"attention_width": 0}, r"model.attention-width \(0\) must be at least 1"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=f"^{message}$") as refusal:
        replace(MIXTURES, **change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("block", "message"),
    [
        (replace(MIXTURE, k=6), r"WHERE.k \(6\) must be between 1 and WHERE.num-experts \(5\)"),
        (replace(MIXTURE, hidden=0), r"WHERE.hidden \(0\) must be at least 1"),
        (replace(MIXTURE, capacity=0.5), r"WHERE.capacity \(0.5\) must be at least 1, or none; .*"),
        (DenseBlock(hidden=0), r"WHERE.hidden \(0\) must be at least 1"),
        *[
            (replace(MIXTURE, gate=gate), message)
            for gate, message in [
                (
                    HierarchicalGate(num_groups=2),
                    r"WHERE.gate.num-groups \(2\) must divide WHERE.num-experts \(5\)",
                ),
                (
                    HierarchicalGate(scope=3),
                    r"WHERE.gate.scope \(3\) is of balanced levels; set WHERE.gate.primary or "
                    r"WHERE.gate.secondary to balanced, or leave it at none",
                ),
                (NoisyTopKGate(noise_epsilon=-1.0), r"WHERE.gate.noise-epsilon \(-1.0\) must be at least 0"),
                (BalancedGate(scope=0), r"WHERE.gate.scope \(0\) must be at least 1 token, or none"),
                (SoftmaxTopKGate(jitter=1.0), r"WHERE.gate.jitter \(1.0\) must be at least 0 and below 1"),
                (SigmoidTopKGate(bias_rate=-1.0), r"WHERE.gate.bias-rate \(-1.0\) must be at least 0"),
            ]
        ],
    ],
)
def test_a_block_that_cannot_be_built_is_refused_by_the_names_of_its_options(side, block, message):
    """They are those that the command line takes, and stored configurations are read by."""
    message = message.replace("WHERE", f"model.{side}-block")
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(MIXTURES, **{f"{side}_block": block})
    data = {**to_json(MIXTURES), f"{side}_block": to_json(block)}
    with pytest.raises(ValueError, match=f"^{message}$"):
        from_json(Translation, data)


def test_a_block_can_become_of_another_kind():
    changes = {"encoder_block.kind": "dense", "encoder_block.hidden": "16", "decoder_block.kind": "none"}
    config = replace_by_path(MIXTURES, changes)
    assert config.encoder_block == DenseBlock(hidden=16)
    assert config.decoder_block.kind == "none"
    assert "encoder_block.hidden" in {option.path for option in options(config)}


@of_every_kind
def test_a_config_is_the_same_after_json_and_cannot_be_changed(kind):
    config = CONFIGS[kind]
    assert from_json(Translation, to_json(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.width = 3


def test_every_field_says_what_it_means():
    for config in CONFIGS.values():
        assert [option.path for option in options(config) if not option.doc] == []
