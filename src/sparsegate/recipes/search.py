"""A small search: every pair of some learning rates and dropouts, each a run that can be resumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console

from ..training.config import RunConfig
from ..training.loop import train
from ..training.overrides import to_json
from ..training.storage import write_json_atomically


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a search. valid_nll: the best over the run, nats per token on the validation split."""

    learning_rate: float
    dropout: float
    valid_nll: float
    best_step: int
    folder: str


def search(
    config: RunConfig,
    *,
    folder: Path,
    learning_rates: Sequence[float],
    dropouts: Sequence[float],
    console: Console | None,
    on_trial: Callable[[Trial], None],
) -> list[Trial]:
    """Train every pair, and return the trials, best first; `search.json` in the folder holds them as well.

    A search that was stopped goes on where it stopped when it is started again. on_trial: is told each trial.
    """
    trials = []
    for learning_rate, dropout in product(learning_rates, dropouts):
        trial_folder = folder / f"lr-{learning_rate:g}-dropout-{dropout:g}"
        trial_config = replace(
            config,
            optim=replace(config.optim, learning_rate=learning_rate),
            model=replace(config.model, dropout=dropout),
        )
        result = train(trial_config, folder=trial_folder, resume=True, console=console)
        if result.stopped_by:
            raise KeyboardInterrupt
        progress = result.state.progress
        trials.append(
            Trial(
                learning_rate=learning_rate,
                dropout=dropout,
                valid_nll=progress.best_nll,
                best_step=progress.best_step,
                folder=trial_folder.name,
            )
        )
        on_trial(trials[-1])
        trials.sort(key=lambda trial: trial.valid_nll)
        write_json_atomically(folder / "search.json", [dict(to_json(trial)) for trial in trials])
    return trials
