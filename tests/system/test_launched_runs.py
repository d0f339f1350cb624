"""Runs under torchrun: killed ranks, signals, silence."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from sparsegate.training.loop import train
from sparsegate.training.run_folder import saved_steps
from tests.helpers.launched import Launched
from tests.helpers.rank_runs import assert_alike, ended, exact
from tests.helpers.restarted_runs import KINDS_ON_RANKS
from tests.helpers.runs import LINES, make_dataset
from tests.helpers.tiny_runs import TINY_DATASETS, tiny_run, with_gates

STEPS = 30
PROGRAM = "from tests.helpers.restarted_runs import main; main()"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = make_dataset(tmp_path_factory.mktemp("data") / "text").directory
    run = tiny_run(data, steps=STEPS, evaluate_every=STEPS, checkpoint_every=4, timeout=60.0)
    return with_gates(run, "noisy_topk")


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The same run on two ranks without any trouble."""
    run = Launched(tmp_path_factory.mktemp("undisturbed") / "run", config, num_ranks=2, pause_s=0)
    assert run.end() == 0, run.said()
    return ended(run.folder)


@pytest.fixture(scope="module")
def undisturbed_exact(config, tmp_path_factory):
    """The run of one process, without dropout, whose draws depend on how a batch is split."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(exact(config), folder=folder)
    return ended(folder)


def test_a_run_of_which_a_rank_is_killed_ends_bit_for_bit_as_if_none_had_been(config, undisturbed, tmp_path):
    run = Launched(tmp_path / "run", config, num_ranks=2, restarts=1, pause_s=0.05)
    run.wait_for_step(6)
    run.kill(1)
    assert run.end() == 0, run.said()
    assert_alike(ended(run.folder), undisturbed, tolerance=0)


@pytest.mark.nightly
def test_a_signal_to_all_ranks_saves_once_and_leaves(config, undisturbed, tmp_path):
    run = Launched(tmp_path / "run", config, num_ranks=2, pause_s=0.2)
    run.wait_for_step(6)
    run.process.send_signal(signal.SIGTERM)  # torchrun hands it on to all ranks
    run.end(within_s=40)
    assert 6 <= saved_steps(run.folder)[0] < STEPS
    again = Launched(run.folder, config, num_ranks=2, pause_s=0)
    assert again.end() == 0, again.said()
    assert_alike(ended(run.folder), undisturbed, tolerance=0)


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("language", 2),
        *(pytest.param(kind, 50, marks=pytest.mark.nightly) for kind in ("language", "background")),
        *(pytest.param(kind, 10, marks=pytest.mark.nightly) for kind in ("translation", "copies")),
    ],
)
def test_runs_of_which_ranks_are_killed_at_random_moments_end_as_if_none_had_been(kind, kills, tmp_path):
    """The first rank too, and at any moment: in steps, evaluations and saves, and before the first."""
    task, _ = KINDS_ON_RANKS[kind]
    TINY_DATASETS[task](tmp_path / "text", lines=LINES[:100]).directory.rename(tmp_path / "dataset")
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), kind, str(kills), "1"],
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr
    report = json.loads(program.stdout.splitlines()[-1])
    assert report["kills"] == kills
    whole = ended(tmp_path / "whole")
    for job in range(report["jobs"]):
        assert_alike(ended(tmp_path / f"job-{job}"), whole, tolerance=0)


@pytest.mark.nightly
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1)])
def test_a_run_that_is_lost_goes_on_with_another_number_of_ranks(
    before, after, config, undisturbed_exact, tmp_path
):
    run = Launched(tmp_path / "run", exact(config), num_ranks=before, pause_s=0.05)
    run.wait_for_step(6)
    run.lose()
    again = Launched(run.folder, exact(config), num_ranks=after, pause_s=0)
    assert again.end() == 0, again.said()
    assert_alike(ended(run.folder), undisturbed_exact, tolerance=2e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_ends_the_run_and_is_named(silent, config, tmp_path):
    """The others after the timeout, torchrun half a minute later: that is how long it lets a rank leave."""
    run = Launched(
        tmp_path / "run",
        replace(config, training=replace(config.training, timeout=4.0)),
        num_ranks=3,
        pause_s=0.05,
    )
    run.wait_for_step(5)
    run.kill(silent, signal.SIGSTOP)
    assert run.end(within_s=60) != 0
    assert re.search(
        rf"the ranks waited in vain for rank {silent}, after step [5-9], in \w+\.\w+ \(", run.said()
    )
