"""The paper's models at a quarter of their width: each trains on two CPU cores in minutes.

Widths are 128 for 512, 256 for 1024 and so on, so that all of them have the same multiply-adds per word as
each other, as the paper's have; two at half the width cost four times as much. Unlike the paper's they have
biases in the LSTMs and read text as continuous streams, and from 256 experts on these learn at a quarter of
the rate: each sees few tokens of a batch of a thousand (docs/results.md).
"""

from dataclasses import replace
from typing import Any

from ..models import FeedForwardLM, LanguageModelConfig, MixtureLM, RecurrentLM
from ..models.gates import GateConfig, HierarchicalGate, NoisyTopKGate
from ..training.config import ContinuousConfig, OptimConfig, RunConfig, TrainingConfig

VOCABULARY = 8192  # subwords; a dataset brings its own
WIDTH = 128
DROPOUT = 0.1


def _run(name: str, model: LanguageModelConfig) -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        batches=ContinuousConfig(batch_size=32, num_steps=32),
        optim=OptimConfig(learning_rate=8e-3, warmup_steps=200),
        training=TrainingConfig(steps=2000, evaluate_every=500),
    )


def _common(width: int = WIDTH) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "width": width,
        "lstm_units": width,
        "lstm_bias": True,
        "dropout": DROPOUT,
    }


def _mixture(name: str, num_experts: int, gate: GateConfig | None = None, *, width: int = WIDTH) -> RunConfig:
    gate = gate or NoisyTopKGate()
    model = MixtureLM(**_common(width), num_experts=num_experts, k=4, hidden=2 * width, gate=gate)
    config = _run(name, model)
    expert_rate = 1.0 if num_experts < 256 else 0.25
    return replace(config, optim=replace(config.optim, expert_rate=expert_rate))


def _hierarchy(num_experts: int, num_groups: int) -> RunConfig:
    """About as many groups as experts in each: at this width 16 groups of 256 would cost a quarter more."""
    return _mixture(f"small-moe-{num_experts}-h", num_experts, HierarchicalGate(num_groups=num_groups))


def small_moe_4() -> RunConfig:
    """moe-4 at width 128."""
    return _mixture("small-moe-4", 4)


def small_moe_32() -> RunConfig:
    """moe-32 at width 128."""
    return _mixture("small-moe-32", 32)


def small_moe_256() -> RunConfig:
    """moe-256 at width 128."""
    return _mixture("small-moe-256", 256)


def small_moe_256_h() -> RunConfig:
    """moe-256-h at width 128."""
    return _hierarchy(256, 16)


def small_moe_1024_h() -> RunConfig:
    """moe-1024-h at width 128, in 32 groups instead of 16."""
    return _hierarchy(1024, 32)


def small_moe_4096_h() -> RunConfig:
    """moe-4096-h at width 128, in 64 groups instead of 16."""
    return _hierarchy(4096, 64)


def small_moe_1_wide() -> RunConfig:
    """moe-1-wide at width 128: hidden 1024."""
    return _run("small-moe-1-wide", FeedForwardLM(**_common(), hidden=(1024,)))


def small_moe_1_deep() -> RunConfig:
    """moe-1-deep at width 128: four hidden layers of 256."""
    return _run("small-moe-1-deep", FeedForwardLM(**_common(), hidden=(256,) * 4))


def small_4xlstm() -> RunConfig:
    """4xlstm-512 at width 128."""
    return _run("small-4xlstm", RecurrentLM(**_common(), num_layers=4))


def small_lstm() -> RunConfig:
    """lstm-2048-512 at width 128: 512 units, projected."""
    model = RecurrentLM(**_common(), num_layers=1)
    return _run("small-lstm", replace(model, lstm_units=4 * WIDTH, lstm_projection=WIDTH))


def small_4xlstm_256() -> RunConfig:
    """4xlstm-512 at width 256: four times the multiply-adds of small-4xlstm."""
    return _run("small-4xlstm-256", RecurrentLM(**_common(2 * WIDTH), num_layers=4))


def small_moe_32_256() -> RunConfig:
    """moe-32 at width 256: about four times the multiply-adds of small-moe-32."""
    return _mixture("small-moe-32-256", 32, width=2 * WIDTH)
