"""A small search over learning rates and dropout: every choice is a run that can be resumed."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console

from ..training.config import RunConfig
from ..training.loop import train
from ..training.overrides import to_json
from ..training.step import NonFinite
from ..training.storage import write_json_atomically
from ..training.strict_json import Json


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a search.

    expert_rate: of the experts, over learning_rate, which is that of everything else. valid_nll: the best
    over the run, nats per token on the validation split; infinity where it diverged.
    """

    learning_rate: float
    expert_rate: float
    dropout: float
    valid_nll: float
    best_step: int
    folder: str


def search(
    config: RunConfig,
    *,
    folder: Path,
    learning_rates: Sequence[float],
    expert_rates: Sequence[float],
    dropouts: Sequence[float],
    console: Console | None,
    on_trial: Callable[[Trial], None],
) -> list[Trial]:
    """Train every choice of the three. The trials, best first; `search.json` in the folder holds them too.

    A choice whose training diverges is one of them, the last. on_trial: is told each trial.

    Raises KeyboardInterrupt where a signal stopped a run: started again, the search goes on where it stopped.
    """
    configs = [
        replace(
            config,
            optim=replace(config.optim, learning_rate=learning_rate, expert_rate=expert_rate),
            model=replace(config.model, dropout=dropout),
        )
        for learning_rate, expert_rate, dropout in product(learning_rates, expert_rates, dropouts)
    ]
    trials: list[Trial] = []
    for trial_config in configs:
        trials.append(_trial(trial_config, folder, console))
        on_trial(trials[-1])
        trials.sort(key=lambda trial: trial.valid_nll)
        write_json_atomically(folder / "search.json", [_row(trial) for trial in trials])
    return trials


def _trial(config: RunConfig, folder: Path, console: Console | None) -> Trial:
    """Train with one choice, or go on with it."""
    optim, dropout = config.optim, config.model.dropout
    name = f"lr-{optim.learning_rate:g}-experts-{optim.expert_rate:g}-dropout-{dropout:g}"
    valid_nll, best_step = math.inf, 0
    with suppress(NonFinite):
        result = train(config, folder=folder / name, resume=True, console=console)
        if result.stopped_by:
            raise KeyboardInterrupt
        progress = result.state.progress
        if progress.best_step:
            valid_nll, best_step = progress.best_nll, progress.best_step
    return Trial(
        learning_rate=optim.learning_rate,
        expert_rate=optim.expert_rate,
        dropout=dropout,
        valid_nll=valid_nll,
        best_step=best_step,
        folder=name,
    )


def _row(trial: Trial) -> dict[str, Json]:
    """JSON has no infinity: null where training diverged."""
    return to_json(trial) | ({} if math.isfinite(trial.valid_nll) else {"valid_nll": None})
