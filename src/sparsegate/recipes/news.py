"""The language models of the paper's table 8, trained on 100 billion words of news (section 5.2, appendix D).

The paper does not state the vocabulary, the dropout, the loss weights and the schedule of these runs. Chosen
here: 100,000 words, which fit every total of the table; no dropout, since no text is read twice; the weights
and the schedule of the smaller corpus, and its sampled softmax.
"""

from dataclasses import replace

from ..models import LanguageModelConfig, MixtureLM, RecurrentLM
from ..models.gates import GateConfig, HierarchicalGate, NoisyTopKGate
from ..training.config import OptimConfig, RunConfig, SentencesConfig, TrainingConfig
from .paper import SAMPLES

VOCABULARY = 100_000
WIDTH = 512


def _run(name: str, model: LanguageModelConfig) -> RunConfig:
    """One pass over 100 billion words in batches of about 2.5 million: 40,000 steps."""
    return RunConfig(
        name=name,
        model=replace(model, softmax_samples=SAMPLES),
        batches=SentencesConfig(batch_words=2_500_000, max_length=128),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1000),
        training=TrainingConfig(steps=40_000),
    )


def _mixture(name: str, num_experts: int, gate: GateConfig) -> RunConfig:
    model = MixtureLM(
        vocab_size=VOCABULARY,
        width=WIDTH,
        lstm_units=WIDTH,
        dropout=0.0,
        num_experts=num_experts,
        k=4,
        hidden=1024,
        gate=gate,
    )
    return _run(name, model)


def _hierarchy(num_experts: int, num_groups: int) -> RunConfig:
    """Two groups, and two experts in each, per word."""
    return _mixture(f"news-moe-{num_experts}-h", num_experts, HierarchicalGate(num_groups=num_groups))


def news_4xlstm_512() -> RunConfig:
    """Four LSTMs, the dense baseline."""
    model = RecurrentLM(vocab_size=VOCABULARY, width=WIDTH, lstm_units=WIDTH, dropout=0.0, num_layers=4)
    return _run("news-4xlstm-512", model)


def news_moe_32() -> RunConfig:
    """32 experts, a flat gate."""
    return _mixture("news-moe-32", 32, NoisyTopKGate())


def news_moe_256_h() -> RunConfig:
    """256 experts in 32 groups."""
    return _hierarchy(256, 32)


def news_moe_1024_h() -> RunConfig:
    """1,024 experts in 32 groups."""
    return _hierarchy(1024, 32)


def news_moe_4096_h() -> RunConfig:
    """4,096 experts in 64 groups."""
    return _hierarchy(4096, 64)


def news_moe_16384_h() -> RunConfig:
    """16,384 experts in 128 groups."""
    return _hierarchy(16384, 128)


def news_moe_65536_h() -> RunConfig:
    """65,536 experts in 256 groups: 68.8 billion parameters, the paper's best model of this table."""
    return _hierarchy(65536, 256)


def news_moe_131072_h() -> RunConfig:
    """131,072 experts in 256 groups: 137.6 billion parameters."""
    return _hierarchy(131072, 256)
