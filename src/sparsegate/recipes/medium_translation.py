"""The small translation models four times as wide: for ten minutes of one GPU.

Width 512 is the paper's; LSTMs have 512 units without projections, where the paper's have 2,048, projected.
A batch has 16,384 target subwords, and 2,000 steps read 33 million. That this takes ten minutes is a plan: no
GPU has run it, and the learning rate, half of the small models', is untuned.
"""

from dataclasses import replace

from ..models.translation import BlockConfig, NoBlock, Translation
from ..training.config import ParallelConfig, RunConfig
from . import small_translation as small

TIMES = 4
BATCH_SUBWORDS = 16_384


def _medium(config: RunConfig) -> RunConfig:
    model = config.model
    assert isinstance(model, Translation)
    assert isinstance(config.batches, ParallelConfig)
    return replace(
        config,
        name=config.name.replace("small", "medium"),
        model=replace(
            model,
            vocab_size=TIMES * model.vocab_size,
            width=TIMES * model.width,
            lstm_units=TIMES * model.lstm_units,
            attention_width=TIMES * model.attention_width,
            encoder_block=_wider(model.encoder_block),
            decoder_block=_wider(model.decoder_block),
        ),
        batches=replace(config.batches, batch_subwords=BATCH_SUBWORDS),
        optim=replace(config.optim, learning_rate=config.optim.learning_rate / 2),
        training=replace(config.training, precision="bfloat16"),
    )


def _wider(block: BlockConfig) -> BlockConfig:
    return block if isinstance(block, NoBlock) else replace(block, hidden=TIMES * block.hidden)


def medium_translation_lstm() -> RunConfig:
    """No mixtures."""
    return _medium(small.small_translation_lstm())


def medium_translation_dense() -> RunConfig:
    """A feed-forward layer in the place of each mixture, with as many multiply-adds."""
    return _medium(small.small_translation_dense())


def medium_translation_moe_32() -> RunConfig:
    """32 experts, four of them active per token on average, strictly balanced."""
    return _medium(small.small_translation_moe_32())


def medium_translation_moe_32_noisy() -> RunConfig:
    """32 experts, four of them active per token, noisy top-k."""
    return _medium(small.small_translation_moe_32_noisy())


def medium_translation_moe_256_h() -> RunConfig:
    """256 experts in 16 groups, strictly balanced at both levels, two of each per token on average."""
    return _medium(small.small_translation_moe_256_h())


def medium_multilingual_dense() -> RunConfig:
    """A feed-forward layer in the place of each mixture, of equal cost: all pairs in one model."""
    return _medium(small.small_multilingual_dense())


def medium_multilingual_moe_64() -> RunConfig:
    """64 experts, two larger ones of them active per token, noisy top-k: all pairs in one model."""
    return _medium(small.small_multilingual_moe_64())
