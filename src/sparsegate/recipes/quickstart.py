"""The quickstart: a small mixture against the dense model of equal cost, on Python's own sources."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ..data import Dataset, TextOptions, prepare, standard_library_files
from ..evaluation import Evaluation
from ..inspection.balance import balance_metrics
from ..models import FeedForwardLM
from ..training.config import RunConfig, TrainingConfig
from ..training.log import read_log
from ..training.loop import train
from .load import load, require_language
from .planner import Plan, TranslationPlan, plan
from .small import small_moe_1_wide, small_moe_32


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the quickstart does. steps: of training, for each model."""

    vocabulary_size: int
    steps: int


FULL = Size(vocabulary_size=2048, steps=1500)
SHORT = Size(vocabulary_size=512, steps=60)


def mixture(size: Size) -> RunConfig:
    """32 experts, four of them active for each token."""
    return _sized("quickstart-moe", small_moe_32(), size)


def dense(size: Size) -> RunConfig:
    """One feed-forward network that does as many multiply-adds as the mixture's active experts and its gate.

    The paper's dense models leave the gate out of the account; here it is in, to the dense model's advantage:
    its hidden layer is widened until it costs at least as much as the mixture.
    """
    config = _sized("quickstart-dense", small_moe_1_wide(), size)
    model = config.model
    assert isinstance(model, FeedForwardLM)
    gate = 2 * mixture(size).model.width * 32
    return replace(config, model=replace(model, hidden=(model.hidden[0] + -(-gate // (2 * model.width)),)))


def corpus(folder: Path, size: Size, *, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """A dataset of the standard library's sources: files held out whole, line for line, indentation kept."""
    if folder.exists():
        return Dataset.open(folder)
    return prepare(
        output=folder,
        train=standard_library_files(),
        vocabulary="subwords",
        vocabulary_size=size.vocabulary_size,
        hold_out="files",
        valid_share=0.03,
        test_share=0.03,
        text=TextOptions(keep_blank_lines=True),
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the comparison. tokens_per_second: of training, the median over the log."""

    name: str
    folder: Path
    plan: Plan | TranslationPlan
    evaluation: Evaluation
    tokens_per_second: float
    balance: dict[str, float]


def compare(config: RunConfig, *, data: Path, folder: Path, console: Console) -> Row | None:
    """Train one model, or go on with it, and measure it on the test split; None where a signal stopped it."""
    config = replace(config, data=str(data))
    if train(config, folder=folder, resume=True, console=console).stopped_by:
        return None
    run = require_language(load(folder))
    evaluation = run.evaluate("test")
    speeds = [
        line["train/tokens_per_second"] for line in read_log(folder / "log.jsonl") if line["kind"] == "step"
    ]
    return Row(
        name=config.name,
        folder=folder,
        plan=plan(run.config.model),
        evaluation=evaluation,
        tokens_per_second=statistics.median(speeds),
        balance=next((balance_metrics(sums) for sums in evaluation.sums.values()), {}),
    )


def _sized(name: str, config: RunConfig, size: Size) -> RunConfig:
    training = TrainingConfig(steps=size.steps, evaluate_every=max(size.steps // 5, 1), checkpoint_every=100)
    return replace(
        config,
        name=name,
        model=replace(config.model, dropout=0.0),
        optim=replace(config.optim, warmup_steps=min(config.optim.warmup_steps, size.steps // 5)),
        training=training,
    )
