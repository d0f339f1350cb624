"""Runs that are killed again and again: `python -m tests.helpers.killed_runs FOLDER KIND KILLS SEED`.

A program of its own, since it forks: it imports torch once, runs nothing in parallel, and each attempt at a
run is a child that trains with `resume=True` until it is done or killed.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from sparsegate.training.checkpoint import latest_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.loop import Run, train
from sparsegate.training.run_folder import checkpoints_of
from tests.helpers.tiny_runs import TINY_RUNS

STEPS = 40
# Of one run: where a run needs longer to begin and save than it is given, kills alone would never end.
MOST_KILLS = 10
# How a run saves, and what it trains.
KINDS = {kind: (kind, {}) for kind in TINY_RUNS} | {"background": ("language", {"background_saves": True})}


def main() -> None:
    folder, kind, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    task, training = KINDS[kind]
    config = TINY_RUNS[task](folder / "dataset", steps=STEPS, **training)
    # What is imported when it is first used is imported here, or each child would begin with seconds of it.
    train(replace(config, training=replace(config.training, steps=1)), folder=folder / "first")
    started = time.monotonic()
    assert attempt(config, folder / "whole", None)
    whole_s = time.monotonic() - started
    chance = random.Random(seed)
    done, jobs = 0, 0
    while done < kills:
        done += job(config, folder / f"job-{jobs}", whole_s, chance)
        jobs += 1
    print(json.dumps({"kills": done, "jobs": jobs}))


def job(config: RunConfig, folder: Path, whole_s: float, chance: random.Random) -> int:
    """One run to its end, which is killed at most so often; how often that was."""
    for kills in range(MOST_KILLS):
        if attempt(config, folder, chance.uniform(0, whole_s / 3), in_save=chance.random() < 0.3):
            return kills
    assert attempt(config, folder, None)
    return MOST_KILLS


def attempt(config: RunConfig, folder: Path, after_s: float | None, *, in_save: bool = False) -> bool:
    """Train in a child, which is killed `after_s` seconds after it began; whether it came to its end.

    in_save: the kill waits for the next save to begin.
    """
    before = newest(folder)
    child = os.fork()
    if child == 0:
        train_and_leave(config, folder, before)
    killed = False
    if after_s is not None:
        killed = not ends_before(child, folder, after_s, in_save=in_save)
        if killed:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert killed or status == 0, status
    assert newest(folder) >= before, "a completed checkpoint is gone"
    return status == 0


def train_and_leave(config: RunConfig, folder: Path, step: int) -> NoReturn:
    """Go on after `step`, and end this child in a way that cannot hang, as that of a forked Python can."""
    code = 1
    try:
        must_resume_at(step)
        train(config, folder=folder, resume=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def must_resume_at(step: int) -> None:
    """A run that begins too early ends alike, since it is deterministic: so its beginning is looked at."""
    plain = Run.resume_or_start

    def resume_or_start(run: Run) -> None:
        plain(run)
        assert run.state.progress.step == step, f"resumed at {run.state.progress.step} instead of {step}"

    Run.resume_or_start = resume_or_start


def ends_before(child: int, folder: Path, after_s: float, *, in_save: bool) -> bool:
    """Wait for the moment at which the child is to be killed; whether it ends before. It is not reaped."""
    until = time.monotonic() + after_s
    while time.monotonic() < until or (in_save and not any(checkpoints_of(folder).glob(".tmp-*"))):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.0005)
    return False


def newest(folder: Path) -> int:
    """Step of the newest whole checkpoint, 0 where there is none; a damaged one is an error."""

    def damaged(message: str) -> None:
        raise AssertionError(message)

    path = latest_checkpoint(checkpoints_of(folder), warn=damaged)
    return 0 if path is None else int(path.name.rpartition("-")[2])


if __name__ == "__main__":
    main()
