"""The language models of the paper's tables 6 and 7, as the paper states them (section 5.1, appendix C).

The paper leaves open the learning rate, Adam's constants, gradient clipping, the length at which sentences
are cut and the initialisers. These are choices of this project and stand in `training/config.py` and in the
layers; the learning rate is worth a search (`sparsegate search`) on any dataset.
"""

from ..models import FeedForwardLM, LanguageModelConfig, MixtureLM, RecurrentLM
from ..training.config import OptimConfig, RunConfig, SentencesConfig, TrainingConfig

VOCABULARY = 793_471  # of the 1 Billion Word benchmark
WIDTH = 512
DROPOUT = 0.1


def _run(name: str, model: LanguageModelConfig) -> RunConfig:
    """10 epochs of 829 million words in batches of about 300,000: 27,000 steps, 1,000 of them warm-up."""
    return RunConfig(
        name=name,
        model=model,
        batches=SentencesConfig(batch_words=300_000, max_length=128),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1000),
        training=TrainingConfig(steps=27_000),
    )


def _mixture(name: str, num_experts: int) -> RunConfig:
    model = MixtureLM(
        vocab_size=VOCABULARY,
        width=WIDTH,
        lstm_units=WIDTH,
        dropout=DROPOUT,
        num_experts=num_experts,
        k=4,
        hidden=1024,
    )
    return _run(name, model)


def _dense(name: str, hidden: tuple[int, ...]) -> RunConfig:
    model = FeedForwardLM(
        vocab_size=VOCABULARY, width=WIDTH, lstm_units=WIDTH, dropout=DROPOUT, hidden=hidden
    )
    return _run(name, model)


def moe_4() -> RunConfig:
    """Four experts, all always active: a dense model in the mixture's clothes."""
    return _mixture("moe-4", 4)


def moe_32() -> RunConfig:
    """32 experts, four of them active per word."""
    return _mixture("moe-32", 32)


def moe_256() -> RunConfig:
    """256 experts, four of them active per word."""
    return _mixture("moe-256", 256)


def moe_1_wide() -> RunConfig:
    """One expert with one hidden layer of 4096."""
    return _dense("moe-1-wide", (4096,))


def moe_1_deep() -> RunConfig:
    """One expert with four hidden layers of 1024."""
    return _dense("moe-1-deep", (1024,) * 4)


def four_lstm_512() -> RunConfig:
    """The mixture replaced by two more LSTMs."""
    model = RecurrentLM(vocab_size=VOCABULARY, width=WIDTH, lstm_units=WIDTH, dropout=DROPOUT, num_layers=4)
    return _run("4xlstm-512", model)


def lstm_2048_512() -> RunConfig:
    """One LSTM of 2048 units, projected to 512."""
    model = RecurrentLM(
        vocab_size=VOCABULARY,
        width=WIDTH,
        lstm_units=2048,
        lstm_projection=WIDTH,
        dropout=DROPOUT,
        num_layers=1,
    )
    return _run("lstm-2048-512", model)
