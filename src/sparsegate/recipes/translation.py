"""The translation models of the paper (sections 5.3 and 5.4, appendix E), and dense ones to compare with.

The paper leaves open the number of groups of the hierarchies, the width of attention, whether the encoder
reads in both directions (`docs/decisions/0012-translation-models.md`), the learning rate, the number of
steps, and the dropout of the multilingual models (none here). A batch is that of one of its up to 64 GPUs;
for all of them give 64 times as many `batches.batch-subwords`. It has two embedding tables and a softmax.
"""

from ..models.gates import BalancedGate, HierarchicalGate, NoisyTopKGate
from ..models.translation import BlockConfig, DenseBlock, MixtureBlock, NoBlock, Translation
from ..training.config import LossConfig, OptimConfig, ParallelConfig, RunConfig, TrainingConfig

VOCABULARY = 32_768  # subwords of both languages; a dataset brings its own
WIDTH = 512
UNITS = 2048
EXPERT = 2048
DROPOUT = 0.4  # of the models of a single pair


def _run(name: str, model: Translation) -> RunConfig:
    """Appendix E's training: a rate that rises for 2,000 steps, stays for 8,000 and then falls."""
    return RunConfig(
        name=name,
        model=model,
        batches=ParallelConfig(batch_subwords=16_000),
        losses=LossConfig(importance=0.01, load=0.01),
        optim=OptimConfig(warmup_steps=2000, constant_steps=8000),
        training=TrainingConfig(steps=100_000),
    )


def _model(name: str, block: BlockConfig, *, dropout: float = DROPOUT) -> RunConfig:
    """LSTMs of 2048 units, projected to 512, three in the encoder and two in the decoder."""
    model = Translation(
        vocab_size=VOCABULARY,
        width=WIDTH,
        lstm_units=UNITS,
        lstm_projection=WIDTH,
        dropout=dropout,
        encoder_block=block,
        decoder_block=block,
        attention_width=WIDTH,
        share_embedding=False,
    )
    return _run(name, model)


def _hierarchy(num_experts: int, *, num_groups: int) -> RunConfig:
    """Strictly balanced at both levels; two groups, and two experts in each, per token on average.

    In evaluation a token has at most 8 groups and 8 experts in each.
    """
    gate = HierarchicalGate(
        num_groups=num_groups, primary="balanced", secondary="balanced", most_groups=8, most_per_group=8
    )
    block = MixtureBlock(num_experts=num_experts, k=4, hidden=EXPERT, gate=gate)
    return _model(f"translation-moe-{num_experts}-h", block)


def translation_lstm() -> RunConfig:
    """No mixtures."""
    return _model("translation-lstm", NoBlock())


def translation_dense() -> RunConfig:
    """A feed-forward layer in the place of each mixture, with as many multiply-adds."""
    return _model("translation-dense", DenseBlock(hidden=4 * EXPERT))


def translation_moe_32() -> RunConfig:
    """32 experts, four of them active per token on average, strictly balanced."""
    block = MixtureBlock(num_experts=32, k=4, hidden=EXPERT, gate=BalancedGate())
    return _model("translation-moe-32", block)


def translation_moe_512_h() -> RunConfig:
    """512 experts in 32 groups."""
    return _hierarchy(512, num_groups=32)


def translation_moe_2048_h() -> RunConfig:
    """2,048 experts in 64 groups: the model of the paper's tables 2 to 4."""
    return _hierarchy(2048, num_groups=64)


def multilingual_moe_512() -> RunConfig:
    """512 larger experts, two of them active per token, noisy top-k: twelve language pairs in one model."""
    block = MixtureBlock(num_experts=512, k=2, hidden=4 * EXPERT, gate=NoisyTopKGate())
    return _model("multilingual-moe-512", block, dropout=0.0)


def multilingual_dense() -> RunConfig:
    """A feed-forward layer in the place of each mixture, with as many multiply-adds."""
    return _model("multilingual-dense", DenseBlock(hidden=8 * EXPERT), dropout=0.0)


def translation_gnmt() -> RunConfig:
    """A dense model of GNMT's size: nine LSTMs of width 1024 in the encoder, eight in the decoder."""
    model = Translation(
        vocab_size=VOCABULARY,
        width=1024,
        lstm_units=1024,
        dropout=0.2,
        encoder_layers=9,
        decoder_layers=8,
        encoder_block=NoBlock(),
        decoder_block=NoBlock(),
        attention="additive",
        attention_width=1024,
        share_embedding=False,
    )
    return _run("translation-gnmt", model)
