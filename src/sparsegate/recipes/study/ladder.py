"""Which models are compared, and that they do the same number of multiply-adds for each word."""

from dataclasses import dataclass, replace
from typing import Literal

from ...models import MixtureLM
from ...models.translation import Translation
from ...training.config import OptimConfig, RunConfig, SentencesConfig, TrainingConfig
from ..planner import plan
from ..registry import recipe

Gates = Literal["within", "on-top"]

# With gates within, hidden layers are narrowed in steps of this many units, which suit vector units: a
# mixture may have this much less than the dense model. With gates on top it may have as much more as the
# paper's own mixtures have (8.9 against 8.4 million).
HIDDEN_STEP = 8
LEAST, MOST_ON_TOP = 0.97, 1.07


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a study is by default on one kind of machine.

    models: their first one has the multiply-adds that all others must have. words: budgets, counted with one
    end for each sentence. search_words: of each trial of the search. checkpoint_every: steps.
    """

    models: tuple[str, ...]
    words: tuple[int, ...]
    learning_rates: tuple[float, ...]
    expert_rates: tuple[float, ...]
    search_words: int
    batches: SentencesConfig
    warmup_steps: int
    precision: Literal["float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]
    checkpoint_every: int


SCALES = {
    "laptop": Scale(
        models=(
            "small-4xlstm",
            "small-moe-1-wide",
            "small-moe-4",
            "small-moe-32",
            "small-moe-256-h",
            "small-moe-1024-h",
            "small-moe-4096-h",
        ),
        words=(200_000, 400_000, 800_000),
        learning_rates=(1.6e-2,),
        expert_rates=(1.0, 0.25, 0.0625),
        search_words=150_000,
        batches=SentencesConfig(batch_words=2048, max_length=64),
        warmup_steps=50,
        precision="float32",
        device="cpu",
        checkpoint_every=200,
    ),
    "gpu": Scale(
        models=(
            "4xlstm-512",
            "moe-1-wide",
            "moe-4",
            "moe-32",
            "moe-256",
            "moe-1024-h",
            "moe-4096-h",
        ),
        words=(2_000_000, 6_000_000, 20_000_000),
        learning_rates=(2e-3, 4e-3),
        expert_rates=(1.0, 0.25, 0.0625),
        search_words=1_000_000,
        batches=SentencesConfig(batch_words=16_384, max_length=64),
        warmup_steps=100,
        precision="bfloat16",
        device="cuda",
        checkpoint_every=2000,
    ),
}


def language_model(name: str) -> RunConfig:
    """The recipe of that name. ValueError: it is of a translation model."""
    config = recipe(name)
    if isinstance(config.model, Translation):
        raise ValueError(f"models ({name}): is a translation model, and a study compares language models")
    return config


def member(name: str, *, budget: int, gates: Gates) -> RunConfig:
    """A recipe with no more than `budget` multiply-adds for each word.

    gates: within: a mixture's experts are narrowed until its gate is paid for; on-top: they are as wide as
    the recipe says, and the gate comes on top, as in the paper.

    ValueError: it has more or less than the comparison allows.
    """
    config = language_model(name)
    if isinstance(config.model, MixtureLM) and gates == "within":
        config = replace(config, model=_narrowed(config.model, budget))
    ops = plan(config.model).ops_per_timestep
    most = 1.0 if gates == "within" else MOST_ON_TOP
    if not LEAST * budget <= ops <= most * budget:
        raise ValueError(
            f"models ({name}): does {ops:,} multiply-adds for each word, and the comparison is at {budget:,} "
            f"({LEAST:.0%} to {most:.0%} of it); give it with other_costs, or leave it out"
        )
    return config


def budget_of(scale: Scale) -> int:
    """Multiply-adds for each word that all models of a scale have: those of its first one, a dense model."""
    return plan(recipe(scale.models[0]).model).ops_per_timestep


def _narrowed(model: MixtureLM, budget: int) -> MixtureLM:
    """The widest experts, in steps of some units and no wider than they were, that stay within the budget."""
    ops = plan(model).ops_per_timestep
    unit = (ops - plan(replace(model, hidden=model.hidden - 1)).ops_per_timestep) if model.hidden > 1 else ops
    excess_units = max(0, -(-(ops - budget) // unit))
    hidden = (model.hidden - excess_units) // HIDDEN_STEP * HIDDEN_STEP
    return replace(model, hidden=min(model.hidden, max(hidden, HIDDEN_STEP)))


def for_study(config: RunConfig, scale: Scale, *, batches: SentencesConfig, dropout: float) -> RunConfig:
    """The recipe as all models of a study are trained: on sentences, with factored Adam for the experts.

    The factored optimizer lets 4,096 experts fit where Adam's two moments would not, so all mixtures have it.
    The softmax is a full one: the vocabularies of studies allow it, and its loss is exact.
    """
    return replace(
        config,
        model=replace(config.model, dropout=dropout, softmax_samples=0),
        batches=batches,
        optim=OptimConfig(experts="factored", warmup_steps=scale.warmup_steps),
        training=TrainingConfig(
            precision=scale.precision,
            device=scale.device,
            checkpoint_every=scale.checkpoint_every,
            keep_checkpoints=1,
        ),
    )
