"""Configurations of runs that take a second, of every task."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sparsegate.models import MixtureLM
from sparsegate.models.translation import MixtureBlock, Translation
from sparsegate.training.config import (
    ContinuousConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from tests.helpers.model_cases import GATES, with_gate
from tests.helpers.runs import make_dataset, make_translation_dataset


def tiny_run(data: Path, *, steps: int = 40, **training: object) -> RunConfig:
    """Everything that has a state: noise, dropout, carried LSTM state, Adam, warm-up, evaluations."""
    return RunConfig(
        name="tiny",
        data=str(data),
        model=MixtureLM(
            vocab_size=1, width=8, lstm_units=8, dropout=0.2, num_experts=4, k=2, hidden=8, lstm_bias=True
        ),
        batches=ContinuousConfig(batch_size=4, num_steps=8),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=15),
        training=TrainingConfig(
            **{"steps": steps, "evaluate_every": 20, "checkpoint_every": 5, "log_every": 1, **training}
        ),
    )


def tiny_translation_run(data: Path, *, steps: int = 40, **training: object) -> RunConfig:
    """The same of a translation model, on sentences of unequal length."""
    mixture = MixtureBlock(num_experts=4, k=2, hidden=8)
    model = Translation(
        vocab_size=1,
        width=8,
        lstm_units=8,
        lstm_bias=True,
        dropout=0.2,
        attention_width=8,
        encoder_block=mixture,
        decoder_block=mixture,
    )
    batches = ParallelConfig(batch_subwords=128)
    return replace(tiny_run(data, steps=steps, **training), model=model, batches=batches)


TINY_RUNS: dict[str, Callable[..., RunConfig]] = {
    "language": tiny_run,
    "translation": tiny_translation_run,
}
TINY_DATASETS = {"language": make_dataset, "translation": make_translation_dataset}


def with_gates(config: RunConfig, name: str) -> RunConfig:
    """The run with six experts in each mixture and the gate of that name."""
    if isinstance(config.model, MixtureLM):
        return replace(config, model=with_gate(config.model, name))
    block = replace(
        config.model.encoder_block, num_experts=6, k=6 if name == "softmax" else 2, gate=GATES[name]
    )
    return replace(config, model=replace(config.model, encoder_block=block, decoder_block=block))
