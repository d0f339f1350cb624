"""The runs of a study: rates for each model, then training that is measured at each budget."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from ...data import Dataset
from ...models import LanguageModel, MixtureLM
from ...training.config import RunConfig
from ...training.display import exp
from ...training.loop import train
from ...training.run_folder import checkpoints_of, saved_steps
from ...training.storage import read_json
from ..search import search
from .config import Study
from .measuring import measure, read_measured, words_per_token, write_measured

SEARCH_SEED = 0

Rates = tuple[float, float]  # the learning rate, and that of the experts over it


class Stopped(Exception):
    """A signal stopped a run, which has been saved."""


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where one run of a study is."""
    return folder / "runs" / name / f"seed-{seed}"


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Trains and measures whatever a study asks for and does not have yet.

    console: where training shows its progress; None: nowhere. say: is told each result in a line.
    """

    study: Study
    folder: Path
    console: Console | None
    say: Callable[[str], None]

    def run(self, on_run: Callable[[], None]) -> None:
        """All runs. on_run: is called after each.

        All models are trained with one seed before any is with the next, so that what is there compares.

        Raises Stopped where a signal stopped a run; called again, it goes on there.
        """
        study, dataset = self.study, Dataset.open(Path(self.study.data))
        for seed in study.seeds:
            for name in (*study.models, *study.other_costs):
                config = study.run_config(name)
                learning_rate, expert_rate = self._rates(config, dataset)
                optim = replace(config.optim, learning_rate=learning_rate, expert_rate=expert_rate)
                self._train(replace(config, seed=seed, optim=optim), dataset)
                on_run()

    def _rates(self, config: RunConfig, dataset: Dataset) -> Rates:
        """Those that were given, or the best of several after a short training, by the validation split."""
        study, where = self.study, self.folder / "search" / config.name
        expert_rates = study.expert_rates if isinstance(config.model, MixtureLM) else (1.0,)
        choices = list(product(study.learning_rates, expert_rates))
        if len(choices) == 1:
            return choices[0]
        if len(_trials(where)) < len(choices):
            steps = steps_for(study.search_words, study, dataset)
            try:
                search(
                    _until(replace(config, seed=SEARCH_SEED), steps),
                    folder=where,
                    learning_rates=study.learning_rates,
                    expert_rates=expert_rates,
                    dropouts=[config.model.dropout],
                    console=self.console,
                    on_trial=lambda t: self.say(
                        f"{config.name}: learning rate {t.learning_rate:g}"
                        + f", experts {t.expert_rate:g} of it" * (expert_rates != (1.0,))
                        + f": {_validation(t.valid_nll)}"
                    ),
                )
            except KeyboardInterrupt:
                raise Stopped from None
        for trial in where.glob("lr-*"):  # nobody needs its weights again
            shutil.rmtree(trial)
        trials = {rates: nll for rates, nll in _trials(where).items() if nll is not None}
        if not trials:
            raise ValueError(f"learning_rates: {config.name} diverged with each of them; give lower ones")
        return min(trials, key=lambda rates: trials[rates])

    def _train(self, config: RunConfig, dataset: Dataset) -> None:
        """Train one model, or go on with it, and measure it on the test split at each budget.

        The learning rate falls with the inverse root of the step however long a run is, so that a longer run
        passes through a shorter one: one run is measured at all budgets.
        """
        where = run_folder(self.folder, config.name, config.seed)
        measured = read_measured(where)
        for words in self.study.words:
            if words in measured:
                continue
            _require_ahead(where, words, max(measured, default=0))
            steps = steps_for(words, self.study, dataset)
            ended = train(_until(config, steps), folder=where, resume=True, console=self.console)
            if ended.stopped_by:
                raise Stopped
            progress = ended.state.progress
            if progress.step != steps:
                raise ValueError(f"{where}: {_PASSED.format(words=words)}")
            assert isinstance(ended.state.model, LanguageModel)
            measured[words] = measure(
                ended.state.model,
                dataset,
                learning_rate=config.optim.learning_rate,
                expert_rate=config.optim.expert_rate,
                step=steps,
                tokens_seen=progress.tokens,
                log=where / "log.jsonl",
            )
            write_measured(where, measured)
            self.say(
                f"{config.name}, seed {config.seed}: test perplexity {measured[words].perplexity:.2f} for "
                f"each word after {words:,} words"
            )
        if not self.study.keep_weights and checkpoints_of(where).is_dir():
            shutil.rmtree(checkpoints_of(where))


_PASSED = "has passed {words:,} words unmeasured; leave this budget out, or remove the run, which begins anew"


def _require_ahead(run: Path, words: int, measured: int) -> None:
    """Refuse a budget that a run cannot be measured at any more."""
    if measured > words:
        raise ValueError(f"{run}: {_PASSED.format(words=words)}")
    if measured and not saved_steps(run):
        raise ValueError(
            f"{run}: ended at {measured:,} words without keeping its weights; leave {words:,} words out, or "
            "remove the run, which begins anew"
        )


def steps_for(words: int, study: Study, dataset: Dataset) -> int:
    """Steps in which a run reads about so many words, ends of sentences counted."""
    return max(1, round(words / (study.batches.batch_words * words_per_token(dataset.split("train")))))


def _until(config: RunConfig, steps: int) -> RunConfig:
    """A run that ends after so many steps, and is evaluated there alone: none stops at its best moment."""
    training = replace(
        config.training,
        steps=steps,
        evaluate_every=steps,
        checkpoint_every=min(config.training.checkpoint_every, steps),
    )
    return replace(config, training=training)


def _trials(folder: Path) -> dict[Rates, float | None]:
    """Rates that were tried, and their loss on the validation split; None: diverged."""
    path = folder / "search.json"
    if not path.is_file():
        return {}
    match read_json(path):
        case list(rows):
            try:
                return dict(map(_trial, rows))
            except (KeyError, TypeError, ValueError):
                pass
    raise ValueError(f"{path}: damaged; remove it, and the search begins anew")


def _trial(row: Any) -> tuple[Rates, float | None]:
    nll = row["valid_nll"]
    return (float(row["learning_rate"]), float(row["expert_rate"])), None if nll is None else float(nll)


def _validation(nll: float) -> str:
    return f"validation perplexity {exp(nll):.2f}" if math.isfinite(nll) else "diverged"
