"""The folder of a run: what it may be made in, and what a run finds there when it goes on."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsegate.models.softmax import OutputSoftmax
from sparsegate.training import loop
from sparsegate.training.checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.log import read_log
from sparsegate.training.loop import train
from sparsegate.training.run_folder import (
    checkpoints_of,
    holds_run,
    read_best,
    read_run_config,
    saved_steps,
    write_best,
)
from sparsegate.training.tasks import open_task
from tests.helpers.tiny_runs import TINY_DATASETS, TINY_RUNS


@pytest.fixture(scope="module", params=TINY_RUNS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    dataset = TINY_DATASETS[request.param](tmp_path_factory.mktemp("text") / "text")
    return TINY_RUNS[request.param](dataset.directory, steps=10)


def with_training(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, training=replace(config.training, **changes))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, by path, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def impossible_batches(config: RunConfig) -> RunConfig:
    change = {"continuous": {"batch_size": 10**6}, "parallel": {"pairs": ("en-de",)}}[config.batches.kind]
    return replace(config, batches=replace(config.batches, **change))


REFUSED: dict[str, Callable[[RunConfig], RunConfig]] = {
    "batch_size|en-de": impossible_batches,
    "training.freeze": lambda config: with_training(config, freeze=("no.such",)),
    "not a run": lambda config: with_training(config, init_from="no/such/run"),
    "not a (translation )?dataset": lambda config: replace(config, data="no/such/dataset"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_made(
    config: RunConfig, tmp_path: Path, message: str
):
    with pytest.raises((ValueError, OSError), match=message):
        train(REFUSED[message](config), folder=tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_refused_and_gets_no_file(config: RunConfig, tmp_path: Path):
    (tmp_path / "letter.txt").write_text("Dear ...")
    with pytest.raises(ValueError, match=r"not empty and not a run; give another --out"):
        train(config, folder=tmp_path)
    assert list(tree(tmp_path)) == ["letter.txt"]


def test_a_finished_run_is_not_touched_without_resume(config: RunConfig, tmp_path: Path):
    train(with_training(config, steps=2), folder=tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        train(config, folder=tmp_path)
    with pytest.raises(ValueError, match="only as what it was"):
        train(replace(config, seed=9), folder=tmp_path, resume=True)
    assert tree(tmp_path) == before


def test_a_run_killed_before_it_had_a_configuration_is_begun_again(config: RunConfig, tmp_path: Path):
    (tmp_path / "lock").write_text("process 1 on host")
    (tmp_path / ".tmp-config.json").write_text('{"name": "ti')
    train(with_training(config, steps=1), folder=tmp_path, resume=True)
    assert not list(tmp_path.glob(".tmp-*"))
    assert saved_steps(tmp_path) == [1]


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path):
    assert not holds_run(tmp_path)
    with pytest.raises(ValueError, match=r"not a run: it has no config\.json"):
        read_run_config(tmp_path)


def test_the_saved_configuration_is_the_resolved_one(config: RunConfig, tmp_path: Path):
    train(with_training(config, steps=1), folder=tmp_path)
    saved, dataset = read_run_config(tmp_path), open_task(config).dataset
    assert saved.data_fingerprint == dataset.fingerprint
    assert saved.model == replace(config.model, vocab_size=dataset.vocabulary.size)
    assert saved.training.steps == 1


def test_length_and_learning_rate_may_change_when_a_run_goes_on(config: RunConfig, tmp_path: Path):
    train(with_training(config, steps=2), folder=tmp_path)
    changed = with_training(replace(config, optim=replace(config.optim, learning_rate=1e-3)), steps=3)
    assert train(changed, folder=tmp_path, resume=True).state.progress.step == 3
    assert read_run_config(tmp_path).optim.learning_rate == 1e-3


def test_best_is_a_step_or_none_or_refused(tmp_path: Path):
    assert read_best(tmp_path) is None
    checkpoints_of(tmp_path).mkdir()
    write_best(tmp_path, step=7, nll=1.5)
    assert read_best(tmp_path) == 7
    for damaged in ('{"step": "7"}', '{"step": true}', "[7]", "{}"):
        (checkpoints_of(tmp_path) / "best.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"best\.json: does not name a step; remove it"):
            read_best(tmp_path)


@pytest.mark.parametrize("moment", ["delete_others", "write_best"])
def test_the_best_checkpoint_is_there_at_any_moment(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Before the pointer moves, and before anything goes: a run may be killed then, or be read."""
    plain, found = getattr(loop, moment), []

    def looking(*given: object, **options: object) -> None:
        if (best := read_best(tmp_path)) is not None:
            load_checkpoint(checkpoints_of(tmp_path) / checkpoint_name(best))
            found.append(best)
        plain(*given, **options)

    monkeypatch.setattr(loop, moment, looking)
    config = replace(config, optim=replace(config.optim, learning_rate=1e-2, warmup_steps=1))
    train(with_training(config, keep_checkpoints=1, evaluate_every=3), folder=tmp_path)
    assert len(set(found)) > 1


@pytest.mark.parametrize("evaluate_every", [3, 6])
def test_no_pointer_outlives_the_checkpoint_that_it_names(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate_every: int
):
    """Step 6, the best, is damaged; of step 5 the best was step 3, which is gone, or none; then it stops."""
    config = with_training(config, evaluate_every=evaluate_every, checkpoint_every=5, keep_checkpoints=2)
    config = replace(config, optim=replace(config.optim, learning_rate=1e-2, warmup_steps=1))
    train(with_training(config, steps=6), folder=tmp_path)
    assert (read_best(tmp_path), saved_steps(tmp_path)) == (6, [6, 5])
    (checkpoints_of(tmp_path) / checkpoint_name(6) / "model.safetensors").write_bytes(b"")
    plain = loop.Run.step

    def signalled(run: loop.Run) -> None:
        plain(run)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "step", signalled)
    assert train(with_training(config, evaluate_every=9), folder=tmp_path, resume=True).stopped_by
    assert (read_best(tmp_path), saved_steps(tmp_path)) == (None, [6, 5])


def test_saved_steps_are_the_newest_first_and_nothing_but_checkpoints(tmp_path: Path):
    names = ["step-00000005", "step-00000120", "step-5", ".tmp-step-00000007", ".old-step-00000003", "x"]
    for name in names:
        (checkpoints_of(tmp_path) / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [120, 5]


def test_a_damaged_checkpoint_is_passed_over_said_and_not_kept_for_a_good_one(
    config: RunConfig, tmp_path: Path
):
    config = with_training(config, keep_checkpoints=2, evaluate_every=1000)
    whole = train(config, folder=tmp_path / "whole")
    folder = tmp_path / "run"
    train(with_training(config, steps=8, keep_checkpoints=3), folder=folder)
    newest = latest_checkpoint(checkpoints_of(folder))
    assert newest is not None
    assert newest.name == checkpoint_name(8)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    end = train(config, folder=folder, resume=True)
    (warning,) = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "warning"]
    assert "model.safetensors" in warning["message"]
    assert set(saved_steps(folder)) == {10, 5}
    for step in saved_steps(folder):
        load_checkpoint(checkpoints_of(folder) / checkpoint_name(step))
    for name, weight in whole.state.model.state_dict().items():
        assert torch.equal(end.state.model.state_dict()[name], weight)


def test_a_skipped_batch_is_logged_once_however_often_the_run_is_resumed(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Batch 5 is bad: it comes right after the checkpoint of step 5."""
    plain = OutputSoftmax.nll
    calls = iter([False] * 5 + [True] + [False] * 2 + [True] + [False] * 100)  # the run dies after batch 7

    def nll(softmax: OutputSoftmax, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = plain(softmax, hidden, target)
        return value * float("nan") if softmax.training and next(calls) else value

    monkeypatch.setattr(OutputSoftmax, "nll", nll)
    with monkeypatch.context() as patch:
        patch.setattr("sparsegate.training.loop.Run.save_is_due", die_at(step=7))
        with pytest.raises(ZeroDivisionError):
            train(config, folder=tmp_path)
    train(config, folder=tmp_path, resume=True)
    skipped = [line["batch"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "skipped"]
    assert skipped == [5]


def die_at(*, step: int) -> Callable[..., bool]:
    def save_is_due(run: object) -> bool:
        progress = run.state.progress  # type: ignore[attr-defined]
        if progress.step == step:
            raise ZeroDivisionError
        return progress.step == 5 and progress.skipped_in_a_row == 0

    return save_is_due
