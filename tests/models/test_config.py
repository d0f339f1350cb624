"""A config that cannot be built is refused in one line that names the field, its value and the cure."""

from dataclasses import FrozenInstanceError, replace

import pytest

from tests.helpers.model_cases import CONFIGS


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("recurrent", {"vocab_size": 0}, r"model.vocab-size \(0\) must be at least 1"),
        ("recurrent", {"width": 0}, r"model.width \(0\) must be at least 1"),
        ("recurrent", {"lstm_units": -1}, r"model.lstm-units \(-1\) must be at least 1"),
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
            {"lstm_projection": 6},
            r"model.lstm-projection \(6\) must be .* model.lstm-units \(6\).*",
        ),
        ("projected", {"lstm_projection": -6}, r"model.lstm-projection \(-6\) must be at least 0 .*"),
        ("mixture", {"k": 6}, r"model.k \(6\) must be between 1 and model.num-experts \(5\)"),
        ("mixture", {"k": 0}, r"model.k \(0\) must be between 1 and model.num-experts \(5\)"),
        ("mixture", {"hidden": 0}, r"model.hidden \(0\) must be at least 1"),
        ("mixture", {"noise_epsilon": -1.0}, r"model.noise-epsilon \(-1.0\) must be at least 0"),
        ("feed_forward", {"hidden": ()}, r"model.hidden \(\(\)\) must name at least one layer .*"),
        ("feed_forward", {"hidden": (4, 0)}, r"model.hidden \(\(4, 0\)\) must name at least one layer .*"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_in_one_line(kind, change, message):
    with pytest.raises(ValueError, match=f"^{message}$") as refusal:
        replace(CONFIGS[kind], **change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_a_value_that_cannot_be_changed(kind):
    config = CONFIGS[kind]
    assert replace(config) == config
    with pytest.raises(FrozenInstanceError):
        config.width = 3
