"""A config that cannot be built is refused in one line that names the field, its value and the cure."""

from dataclasses import FrozenInstanceError, replace

import pytest

from sparsegate.models.gates import HierarchicalGate
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, r"k \(6\) must be between 1 and num-experts \(5\)"),
        ({"hidden": 0}, r"hidden \(0\) must be at least 1"),
        ({"capacity": 0.5}, r"capacity \(0.5\) must be at least 1, or none; .*"),
        (
            {"gate": HierarchicalGate(num_groups=2)},
            r"gate.num-groups \(2\) must divide num-experts \(5\)",
        ),
    ],
)
def test_a_block_that_cannot_be_built_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(MIXTURE, **change)


def test_a_dense_block_without_a_unit_is_refused():
    with pytest.raises(ValueError, match=r"^hidden \(0\) must be at least 1$"):
        DenseBlock(hidden=0)


def test_the_command_line_names_the_block():
    with pytest.raises(ValueError, match=r"^encoder_block.k \(9\) must be between 1 and num-experts \(5\)"):
        replace_by_path(MIXTURES, {"encoder_block.k": "9"})


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
