"""Checkpoints written while training goes on are the same, and a run ends with all of them written."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sparsegate.models.memory import training_memory
from sparsegate.training import checkpoint, loop
from sparsegate.training.background import Background
from sparsegate.training.checkpoint import load_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.loop import train
from sparsegate.training.memory import method_of
from sparsegate.training.run_folder import checkpoints_of, read_best, saved_steps
from sparsegate.training.storage import CannotSave
from tests.helpers.checkpoints import assert_same_tensors, unfinished
from tests.helpers.rank_runs import failing_train_on_rank, train_on_rank
from tests.helpers.runs import make_dataset
from tests.helpers.tiny_runs import tiny_run, with_gates


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    data = make_dataset(tmp_path_factory.mktemp("data") / "text").directory
    run = tiny_run(data, steps=12, evaluate_every=6, checkpoint_every=2, keep_checkpoints=20)
    return with_gates(run, "noisy_topk")


def in_background(config: RunConfig) -> RunConfig:
    return replace(config, training=replace(config.training, background_saves=True))


def before_a_file(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something before each file of a checkpoint is written."""
    real = checkpoint.write_file

    def write_file(path: Path, chunks):
        act()
        return real(path, chunks)

    monkeypatch.setattr(checkpoint, "write_file", write_file)


def slowly(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    before_a_file(monkeypatch, lambda: time.sleep(by_s))


def assert_same_checkpoints(folder: Path, expected: Path) -> None:
    assert saved_steps(folder) == saved_steps(expected)
    assert read_best(folder) == read_best(expected)
    for step in saved_steps(expected):
        one, other = (load_checkpoint(checkpoints_of(f) / f"step-{step:08d}") for f in (folder, expected))
        assert one.state == other.state
        assert_same_tensors(one.tensors, other.tensors)


def test_every_checkpoint_is_that_of_its_step(config, tmp_path, monkeypatch):
    train(config, folder=tmp_path / "waiting")
    slowly(monkeypatch, 0.02)
    train(in_background(config), folder=tmp_path / "background")
    assert len(saved_steps(tmp_path / "background")) == 6
    assert_same_checkpoints(tmp_path / "background", tmp_path / "waiting")


def test_steps_are_made_while_a_checkpoint_is_written(config, tmp_path, monkeypatch):
    went_on = threading.Event()
    saved: list[bool] = []
    before_a_file(monkeypatch, lambda: saved.append(went_on.wait(timeout=20)))
    plain = loop.Run.step

    def step(run: loop.Run) -> None:
        plain(run)
        if run.state.progress.step == 3:
            went_on.set()

    monkeypatch.setattr(loop.Run, "step", step)
    train(in_background(config), folder=tmp_path / "run")
    assert all(saved)


def test_what_a_writer_could_not_do_is_told_at_the_next_save_and_the_checkpoint_before_is_there(
    config, tmp_path, monkeypatch
):
    def full() -> None:
        if saved_steps(tmp_path / "run")[:1] == [4]:
            raise OSError(28, "No space left on device")

    before_a_file(monkeypatch, full)
    reached: list[int] = []
    plain = loop.Run.step
    monkeypatch.setattr(loop.Run, "step", lambda run: plain(run) or reached.append(run.state.progress.step))
    with pytest.raises(CannotSave, match="step-00000006: cannot save: No space left"):
        train(in_background(config), folder=tmp_path / "run")
    assert reached[-1] == 8
    assert saved_steps(tmp_path / "run")[0] == 4
    assert all(name == "best.json" for name in unfinished(checkpoints_of(tmp_path / "run")))


def test_what_the_last_writer_could_not_do_is_told_at_the_end(config, tmp_path, monkeypatch):
    def full() -> None:
        if saved_steps(tmp_path / "run")[:1] == [10]:
            raise OSError(28, "No space left on device")

    before_a_file(monkeypatch, full)
    with pytest.raises(CannotSave, match="step-00000012"):
        train(in_background(config), folder=tmp_path / "run")


def test_an_error_in_training_leaves_the_checkpoint_that_was_begun_whole(config, tmp_path, monkeypatch):
    slowly(monkeypatch, 0.1)
    plain = loop.Run.step

    def step(run: loop.Run) -> None:
        if run.state.progress.step == 4:
            raise RuntimeError("no more")
        plain(run)

    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(RuntimeError, match="no more"):
        train(in_background(config), folder=tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [4, 2]
    load_checkpoint(checkpoints_of(tmp_path / "run") / "step-00000004")


def test_ranks_write_the_same_in_the_background(config, ranks, tmp_path):
    ranks.run(train_on_rank, 3, config, str(tmp_path / "waiting"))
    assert ranks.run(train_on_rank, 3, in_background(config), str(tmp_path / "background")) == [""] * 3
    assert_same_checkpoints(tmp_path / "background", tmp_path / "waiting")


def test_what_one_rank_cannot_write_is_told_once(config, ranks, tmp_path):
    first, *others = ranks.run(failing_train_on_rank, 3, in_background(config), str(tmp_path), 1, 6)
    assert "step-00000006: cannot save" in first
    assert "rank 1: [Errno 28] No space left on device" in first
    assert others == ["told elsewhere"] * 2
    assert saved_steps(tmp_path)[0] == 4


def test_the_copy_counts_where_memory_is_planned(config):
    background = replace(config, training=replace(config.training, background_saves=True, device="cpu"))
    without, with_copy = (training_memory(c.model, method_of(c)) for c in (config, background))
    assert with_copy.peak == without.peak + without.weights + without.optimizer


def test_work_is_done_one_piece_after_the_other():
    order: list[str] = []
    with Background() as background:
        background.start(lambda: time.sleep(0.05) or order.append("first"))
        background.start(lambda: order.append("second"))
    assert order == ["first", "second"]
    background.finish()
