"""A configuration is refused when it is made, in one line: the field, its value, and what it may be."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest

from sparsegate.models import RecurrentLM
from sparsegate.recipes.small import small_moe_32
from sparsegate.training.config import (
    ContinuousConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SentencesConfig,
    TrainingConfig,
)
from sparsegate.training.overrides import from_json, options, to_json
from tests.helpers.model_cases import with_gate

MODEL = RecurrentLM(vocab_size=5, width=2, lstm_units=2, dropout=0.0, num_layers=1)
NAN = float("nan")

REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (ContinuousConfig, {"batch_size": 0}, "batches.batch-size (0) must be at least 1"),
    (ContinuousConfig, {"num_steps": -3}, "batches.num-steps (-3) must be at least 1"),
    (SentencesConfig, {"max_length": 0}, "batches.max-length (0) must be at least 1"),
    (
        SentencesConfig,
        {"batch_words": 10, "max_length": 11},
        "batches.batch-words (10) must be at least batches.max-length (11)",
    ),
    (LossConfig, {"importance": -0.1}, "losses.importance (-0.1) must be at least 0"),
    (LossConfig, {"load": NAN}, "losses.load (nan) must be at least 0"),
    (LossConfig, {"switch": -1.0}, "losses.switch (-1.0) must be at least 0"),
    (LossConfig, {"z": NAN}, "losses.z (nan) must be at least 0"),
    (LossConfig, {"threshold": -1.0}, "losses.threshold (-1.0) must be at least 0"),
    (OptimConfig, {"learning_rate": 0.0}, "optim.learning-rate (0.0) must be above 0"),
    (OptimConfig, {"learning_rate": NAN}, "optim.learning-rate (nan) must be above 0"),
    (OptimConfig, {"warmup_steps": -1}, "optim.warmup-steps (-1) must be at least 0"),
    (OptimConfig, {"beta1": 1.0}, "optim.beta1 (1.0) must be at least 0 and below 1"),
    (OptimConfig, {"beta2": -0.1}, "optim.beta2 (-0.1) must be at least 0 and below 1"),
    (OptimConfig, {"epsilon": 0.0}, "optim.epsilon (0.0) must be above 0"),
    (OptimConfig, {"clip_norm": 0.0}, "optim.clip-norm (0.0) must be above 0"),
    *(
        (TrainingConfig, {name: 0}, f"training.{name.replace('_', '-')} (0) must be at least 1")
        for name in (
            "steps",
            "micro_batches",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "max_nonfinite",
        )
    ),
    (RunConfig, {"name": "x", "model": MODEL, "seed": -1}, "seed (-1) must be at least 0"),
    *[
        (
            RunConfig,
            {
                "name": "x",
                "model": with_gate(small_moe_32().model, gate),
                "losses": LossConfig(threshold=0.0),
            },
            "losses.threshold (0.0) must be above 0 with a balanced gate, whose thresholds it trains for "
            "evaluation",
        )
        for gate in ("balanced", "balanced_hierarchy")
    ],
    (
        RunConfig,
        {
            "name": "x",
            "model": MODEL,
            "batches": ContinuousConfig(batch_size=2),
            "training": TrainingConfig(micro_batches=3),
        },
        "training.micro-batches (3) must be at most batches.batch-size (2)",
    ),
]


@pytest.mark.parametrize(("make", "values", "message"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name(
    make: Callable[..., Any], values: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match="must be") as refused:
        make(**values)
    assert str(refused.value) == message


def test_every_field_says_what_it_means():
    assert [option.path for option in options(small_moe_32()) if not option.doc] == []


def test_a_configuration_is_the_same_after_json():
    config = RunConfig(
        name="x",
        model=MODEL,
        batches=SentencesConfig(batch_words=64, max_length=16),
        training=TrainingConfig(skip_batches=(3, 4), freeze=("layers.*",)),
    )
    assert from_json(RunConfig, to_json(config)) == config


def test_nothing_in_it_can_be_changed():
    def check(section: Any) -> None:
        for field in fields(section):
            with pytest.raises(FrozenInstanceError):
                setattr(section, field.name, None)
            if is_dataclass(value := getattr(section, field.name)):
                check(value)

    check(small_moe_32())
