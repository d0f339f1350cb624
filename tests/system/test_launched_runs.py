"""Runs under torchrun: killed ranks, signals, silence."""

import random
import re
import signal
import time
from dataclasses import replace

import pytest

from sparsegate.training.run_folder import saved_steps
from tests.helpers.launched import Launched
from tests.helpers.rank_runs import assert_alike, ended
from tests.helpers.runs import make_dataset
from tests.helpers.tiny_runs import tiny_run, with_gates

STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = make_dataset(tmp_path_factory.mktemp("data") / "text").directory
    run = tiny_run(data, steps=STEPS, evaluate_every=STEPS, checkpoint_every=4, timeout=20.0)
    return with_gates(run, "noisy_topk")


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The same run on two ranks without any trouble."""
    run = Launched(tmp_path_factory.mktemp("undisturbed") / "run", config, num_ranks=2, pause_s=0)
    assert run.end() == 0, run.said()
    return ended(run.folder)


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


@pytest.mark.nightly
def test_ranks_killed_twenty_times_at_random_change_nothing(config, tmp_path):
    """The first rank too, and at any moment: also while a checkpoint is written, or before the first one."""
    whole = Launched(tmp_path / "whole", config, num_ranks=4, pause_s=0)
    assert whole.end() == 0, whole.said()
    chance = random.Random(0)
    run = Launched(tmp_path / "killed", config, num_ranks=4, restarts=20, pause_s=0.2)
    for _ in range(20):
        run.wait_for_new_ranks()
        time.sleep(chance.uniform(0, 8))
        run.kill(chance.randrange(4))
    assert run.end(within_s=300) == 0, run.said()
    assert_alike(ended(run.folder), ended(whole.folder), tolerance=0)


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
