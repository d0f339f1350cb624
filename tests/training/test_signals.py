"""A signal saves and leaves, at whatever moment it comes; a second one ends the process at once."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sparsegate.training.checkpoint import checkpoint_name, load_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.loop import Run, train
from sparsegate.training.run_folder import checkpoints_of, saved_steps
from sparsegate.training.signals import stop_requests
from tests.helpers.runs import make_dataset
from tests.helpers.tiny_runs import TINY_DATASETS, TINY_RUNS, tiny_run
from tests.training.test_kills import assert_same_ends

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def harmless() -> Iterator[None]:
    """A signal that comes after the run has ended ends nothing."""
    before = {each: signal.signal(each, lambda number, frame: None) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_signal_is_told_by_name_and_handlers_come_back(number: signal.Signals):
    with harmless():
        before = [signal.getsignal(each) for each in SIGNALS]
        with stop_requests() as stop:
            assert stop() == ""
            os.kill(os.getpid(), number)
            assert stop() == number.name
            assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL] * 3
        assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals):
    program = f"""
import os, signal
from sparsegate.training.signals import stop_requests
with stop_requests() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop(), flush=True)
    os.kill(os.getpid(), {int(second)})
    print("still here")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "SIGTERM\n"
    assert ended.returncode == -second


@pytest.mark.parametrize("task", TINY_RUNS)
@pytest.mark.parametrize("moments", [6, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_run_stopped_at_random_moments_loses_no_step_and_ends_as_if_it_had_not_been(
    tmp_path: Path, moments: int, task: str, monkeypatch: pytest.MonkeyPatch
):
    config = TINY_RUNS[task](TINY_DATASETS[task](tmp_path / "text").directory)
    train(replace(config, training=replace(config.training, steps=1)), folder=tmp_path / "warm")
    started = time.monotonic()
    train(config, folder=tmp_path / "whole")
    whole_s = time.monotonic() - started
    chance, stops, runs = random.Random(0), 0, 0
    steps = record_steps(monkeypatch)
    while stops < moments:
        folder = tmp_path / f"run-{runs}"
        runs += 1
        while stopped_by := stopped_run(config, folder, chance, chance.uniform(0, whole_s / 3)):
            assert stopped_by in {each.name for each in SIGNALS}
            stops += 1
            assert_saved(folder, steps)
        assert_same_ends(folder, tmp_path / "whole")


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every step that was made, in order."""
    steps: list[int] = []
    plain = Run.step

    def step(run: Run) -> None:
        plain(run)
        steps.append(run.state.progress.step)

    monkeypatch.setattr(Run, "step", step)
    return steps


def stopped_run(config: RunConfig, folder: Path, chance: random.Random, after_s: float) -> str:
    """Train until the end or a real signal; which one it was, or ""."""
    number = chance.choice(SIGNALS)
    with harmless():
        # To this thread, since only it runs handlers, wherever it is at that moment.
        timer = threading.Timer(after_s, signal.pthread_kill, (threading.get_ident(), number))
        timer.start()
        try:
            return train(config, folder=folder, resume=True).stopped_by
        finally:
            timer.cancel()
            timer.join()


def assert_saved(folder: Path, steps: list[int]) -> None:
    """The newest checkpoint is whole, and of the last step that was made."""
    newest = saved_steps(folder)
    if newest:
        assert newest[0] == steps[-1]
        load_checkpoint(checkpoints_of(folder) / checkpoint_name(newest[0]))
    else:
        assert not steps or steps[-1] == 40  # before the first step of this run


def test_training_in_another_thread_runs_and_leaves_the_handlers_alone(tmp_path: Path):
    config = tiny_run(make_dataset(tmp_path / "text").directory)
    before = [signal.getsignal(each) for each in SIGNALS]
    ended: list[str] = []

    def target() -> None:
        result = train(config, folder=tmp_path / "run")
        ended.append(result.stopped_by)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert ended == [""]
    assert [signal.getsignal(each) for each in SIGNALS] == before
