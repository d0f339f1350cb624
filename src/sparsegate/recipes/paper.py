"""The language models of the paper's tables 6 and 7, as the paper states them (section 5.1, appendix C).

The paper leaves open the learning rate, Adam's constants, gradient clipping, the length at which sentences
are cut and the initialisers. These are choices of this project and stand in `training/config.py` and in the
layers; the learning rate is worth a search (`sparsegate search`) on any dataset. Of MoE-34M and MoE-143M it
does not repeat batch, schedule and loss weights: they are those of the others. It trains by importance
sampling of the softmax without saying how many words; the work that it cites samples 8,192.
"""

from dataclasses import replace

from ..models import FeedForwardLM, LanguageModelConfig, MixtureLM, RecurrentLM
from ..models.gates import GateConfig, HierarchicalGate, NoisyTopKGate
from ..training.config import OptimConfig, RunConfig, SentencesConfig, TrainingConfig

VOCABULARY = 793_471  # of the 1 Billion Word benchmark
SAMPLES = 8192  # of the softmax, Jozefowicz et al. 2016
WIDTH = 512
DROPOUT = 0.1


def _run(name: str, model: LanguageModelConfig) -> RunConfig:
    """10 epochs of 829 million words in batches of about 300,000: 27,000 steps, 1,000 of them warm-up."""
    return RunConfig(
        name=name,
        model=replace(model, softmax_samples=SAMPLES),
        batches=SentencesConfig(batch_words=300_000, max_length=128),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1000),
        training=TrainingConfig(steps=27_000),
    )


def _mixture(
    name: str, num_experts: int, *, dropout: float = DROPOUT, gate: GateConfig | None = None
) -> RunConfig:
    model = MixtureLM(
        vocab_size=VOCABULARY,
        width=WIDTH,
        lstm_units=WIDTH,
        dropout=dropout,
        num_experts=num_experts,
        k=4,
        hidden=1024,
        gate=gate or NoisyTopKGate(),
    )
    return _run(name, model)


def _hierarchy(name: str, num_experts: int, *, dropout: float) -> RunConfig:
    """16 groups, one for each of the paper's GPUs; two of them, and two experts in each, per word."""
    return _mixture(name, num_experts, dropout=dropout, gate=HierarchicalGate(num_groups=16))


def _expensive(name: str, *, num_experts: int, hidden: int, units: int, dropout: float) -> RunConfig:
    """Width 1024 (appendix C.2). 32 groups, one for each GPU: the count that fits the printed operations."""
    model = MixtureLM(
        vocab_size=VOCABULARY,
        width=2 * WIDTH,
        lstm_units=units,
        lstm_projection=0 if units == 2 * WIDTH else 2 * WIDTH,
        dropout=dropout,
        num_experts=num_experts,
        k=4,
        hidden=hidden,
        gate=HierarchicalGate(num_groups=32),
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


def moe_256_h() -> RunConfig:
    """256 experts in 16 groups."""
    return _hierarchy("moe-256-h", 256, dropout=0.1)


def moe_1024_h() -> RunConfig:
    """1,024 experts in 16 groups."""
    return _hierarchy("moe-1024-h", 1024, dropout=0.2)


def moe_4096_h() -> RunConfig:
    """4,096 experts in 16 groups."""
    return _hierarchy("moe-4096-h", 4096, dropout=0.2)


def moe_34m() -> RunConfig:
    """34 million operations per word: width 1024, 1,024 experts with hidden layers of 2048."""
    return _expensive("moe-34m", num_experts=1024, hidden=2048, units=1024, dropout=0.3)


def moe_143m() -> RunConfig:
    """143 million operations per word: LSTMs of 4096 units, projected, 256 experts of 8192."""
    return _expensive("moe-143m", num_experts=256, hidden=8192, units=4096, dropout=0.4)


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
    return _projected("lstm-2048-512", units=2048, width=WIDTH, num_layers=1, dropout=DROPOUT)


def lstm_1024_512() -> RunConfig:
    """One LSTM of 1024 units, projected to 512 (Jozefowicz et al. 2016)."""
    return _projected("lstm-1024-512", units=1024, width=WIDTH, num_layers=1, dropout=DROPOUT)


def lstm_512_512() -> RunConfig:
    """One LSTM of 512 units, projected to 512 (Jozefowicz et al. 2016)."""
    return _projected("lstm-512-512", units=512, width=WIDTH, num_layers=1, dropout=DROPOUT)


def two_lstm_8192_1024() -> RunConfig:
    """Two LSTMs of 8192 units, projected to 1024: the best published model (Jozefowicz et al. 2016)."""
    return _projected("2xlstm-8192-1024", units=8192, width=1024, num_layers=2, dropout=0.25)


def _projected(name: str, *, units: int, width: int, num_layers: int, dropout: float) -> RunConfig:
    model = RecurrentLM(
        vocab_size=VOCABULARY,
        width=width,
        lstm_units=units,
        lstm_projection=width,
        dropout=dropout,
        num_layers=num_layers,
    )
    return _run(name, model)
