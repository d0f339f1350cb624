"""The translation models at a quarter of the paper's width: each trains on one CPU core in minutes.

Widths are 128 for 512. The dense model's hidden layer is k times as wide as an expert's, so that it costs as
many multiply-adds; `small-translation-lstm` has neither. Unlike the paper's they have biases in the LSTMs and
one embedding table, and LSTMs without projections: what a projected one feeds back is not bounded, and at the
learning rates of small models its gradients explode (docs/results.md).
"""

from dataclasses import replace

from ..models.gates import BalancedGate, HierarchicalGate, NoisyTopKGate
from ..models.translation import BlockConfig, DenseBlock, MixtureBlock, NoBlock, Translation
from ..training.config import LossConfig, OptimConfig, ParallelConfig, RunConfig, TrainingConfig

VOCABULARY = 8192  # subwords of all languages; a dataset brings its own
WIDTH = 128
EXPERT = 256
K = 4
DROPOUT = 0.1


def _run(name: str, block: BlockConfig, *, temperature: float = 1.0) -> RunConfig:
    """temperature: above 1, small pairs of languages come more often than their share."""
    model = Translation(
        vocab_size=VOCABULARY,
        width=WIDTH,
        lstm_units=WIDTH,
        lstm_bias=True,
        dropout=DROPOUT,
        encoder_block=block,
        decoder_block=block,
        attention_width=WIDTH,
    )
    return RunConfig(
        name=name,
        model=model,
        batches=ParallelConfig(batch_subwords=1280, temperature=temperature),
        losses=LossConfig(importance=0.01, load=0.01),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=200, constant_steps=800),
        training=TrainingConfig(steps=2000, evaluate_every=500),
    )


def small_translation_lstm() -> RunConfig:
    """No mixtures."""
    return _run("small-translation-lstm", NoBlock())


def small_translation_dense() -> RunConfig:
    """A feed-forward layer in the place of each mixture, with as many multiply-adds."""
    return _run("small-translation-dense", DenseBlock(hidden=K * EXPERT))


def small_translation_moe_32() -> RunConfig:
    """32 experts, four of them active per token on average, strictly balanced."""
    block = MixtureBlock(num_experts=32, k=K, hidden=EXPERT, gate=BalancedGate())
    return _run("small-translation-moe-32", block)


def small_translation_moe_32_noisy() -> RunConfig:
    """32 experts, four of them active per token, noisy top-k."""
    block = MixtureBlock(num_experts=32, k=K, hidden=EXPERT, gate=NoisyTopKGate())
    return _run("small-translation-moe-32-noisy", block)


def small_translation_moe_256_h() -> RunConfig:
    """256 experts in 16 groups, strictly balanced at both levels, two of each per token on average."""
    gate = HierarchicalGate(
        num_groups=16, primary="balanced", secondary="balanced", most_groups=8, most_per_group=8
    )
    return _run("small-translation-moe-256-h", MixtureBlock(num_experts=256, k=K, hidden=EXPERT, gate=gate))


def small_multilingual_dense() -> RunConfig:
    """A feed-forward layer in the place of each mixture, with as many multiply-adds."""
    return _run("small-multilingual-dense", DenseBlock(hidden=4 * EXPERT), temperature=2.0)


def small_multilingual_moe_64() -> RunConfig:
    """64 experts, two larger ones of them active per token, noisy top-k: all pairs in one model.

    The experts learn at a quarter of the rate, since each sees one token in 32 (docs/results.md).
    """
    block = MixtureBlock(num_experts=64, k=2, hidden=2 * EXPERT, gate=NoisyTopKGate())
    config = _run("small-multilingual-moe-64", block, temperature=2.0)
    return replace(config, optim=replace(config.optim, expert_rate=0.25))
