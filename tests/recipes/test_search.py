"""A search tries every choice, puts the best first, and goes on where it stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparsegate.recipes import search as module
from sparsegate.recipes.search import Trial, search
from sparsegate.training.config import RunConfig
from sparsegate.training.loop import Run, train
from sparsegate.training.run_folder import read_run_config
from tests.helpers.tiny_runs import TINY_DATASETS, TINY_RUNS

RATES, EXPERT_RATES, DROPOUTS = [1e-4, 3e-2], [0.5], [0.0, 0.2]


@pytest.fixture(scope="module", params=TINY_RUNS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("text") / "text"
    dataset = TINY_DATASETS[request.param](folder, lines=["a b c d e f g"] * 100)
    config = TINY_RUNS[request.param](dataset.directory, steps=8, evaluate_every=4, checkpoint_every=4)
    return replace(config, optim=replace(config.optim, warmup_steps=1))


def run(config: RunConfig, folder: Path, told: list[Trial] | None = None) -> list[Trial]:
    return search(
        config,
        folder=folder,
        learning_rates=RATES,
        expert_rates=EXPERT_RATES,
        dropouts=DROPOUTS,
        console=None,
        on_trial=(told if told is not None else []).append,
    )


def test_every_choice_is_tried_and_the_best_stands_first(config: RunConfig, tmp_path: Path):
    told: list[Trial] = []
    trials = run(config, tmp_path, told)
    assert {(t.learning_rate, t.dropout) for t in trials} == {(r, d) for r in RATES for d in DROPOUTS}
    assert sorted(told, key=lambda t: t.valid_nll) == trials
    assert trials[0].learning_rate == 3e-2
    for trial in trials:
        saved = read_run_config(tmp_path / trial.folder)
        assert (saved.optim.learning_rate, saved.model.dropout) == (trial.learning_rate, trial.dropout)
        assert saved.optim.expert_rate == trial.expert_rate == 0.5
        best = json.loads((tmp_path / trial.folder / "checkpoints/best.json").read_text())
        assert best == {"step": trial.best_step, "nll": trial.valid_nll}
    assert [row["folder"] for row in json.loads((tmp_path / "search.json").read_text())] == [
        t.folder for t in trials
    ]


def test_a_search_that_was_stopped_ends_as_one_that_was_not(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run(config, tmp_path / "whole")
    steps = 0
    plain = Run.step

    def stopped_at_13(step_of: Run) -> None:
        nonlocal steps
        steps += 1
        if steps == 13:
            raise KeyboardInterrupt
        plain(step_of)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", stopped_at_13)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "parts")
    done = []

    def counted_step(step_of: Run) -> None:
        done.append(1)
        plain(step_of)

    monkeypatch.setattr(Run, "step", counted_step)
    assert run(config, tmp_path / "parts") == whole
    assert len(done) == 4 * 8 - 8 - 4  # one run was done, of the next one half was saved


def test_a_run_that_a_signal_stops_stops_the_search(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(*args: object, **keywords: object) -> object:
        return replace(train(*args, **keywords), stopped_by="SIGTERM")  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    assert not (tmp_path / "search.json").exists()


def test_a_choice_that_diverges_is_the_last_and_stops_nothing(config: RunConfig, tmp_path: Path):
    told: list[Trial] = []
    trials = search(
        config,
        folder=tmp_path,
        learning_rates=[1e30, 1e-2],
        expert_rates=[1.0],
        dropouts=[0.0],
        console=None,
        on_trial=told.append,
    )
    assert [t.learning_rate for t in trials] == [1e-2, 1e30]
    assert trials[-1].valid_nll == float("inf")
    assert json.loads((tmp_path / "search.json").read_text())[-1]["valid_nll"] is None


def test_a_value_out_of_range_is_refused_before_the_first_run(config: RunConfig, tmp_path: Path):
    with pytest.raises(ValueError, match=r"optim\.learning-rate \(-1\.0\) must be above 0"):
        search(
            config,
            folder=tmp_path,
            learning_rates=[1e-2, -1.0],
            expert_rates=[1.0],
            dropouts=[0],
            console=None,
            on_trial=print,
        )
    assert list(tmp_path.iterdir()) == []
