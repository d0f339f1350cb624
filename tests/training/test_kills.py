"""A run that is killed at any moment, and goes on, ends as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsegate.training.checkpoint import checkpoint_name, load_checkpoint
from sparsegate.training.log import read_log
from sparsegate.training.run_folder import checkpoints_of
from tests.helpers.killed_runs import KINDS, STEPS
from tests.helpers.tiny_runs import TINY_DATASETS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_if_it_had_not_been(
    tmp_path: Path, kills: int, kind: str
):
    TINY_DATASETS[KINDS[kind][0]](tmp_path / "text").directory.rename(tmp_path / "dataset")
    program = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed_runs", str(tmp_path), kind, str(kills), "1"],
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr
    report = json.loads(program.stdout.splitlines()[-1])
    assert report["kills"] >= kills
    for job in range(report["jobs"]):
        assert_same_ends(tmp_path / f"job-{job}", tmp_path / "whole")


def assert_same_ends(folder: Path, whole: Path) -> None:
    """Weights, optimizer, carried state, counters and the whole log, without times."""
    end, expected = (load_checkpoint(checkpoints_of(f) / checkpoint_name(STEPS)) for f in (folder, whole))
    assert end.state == expected.state
    assert {file: list(group) for file, group in end.tensors.items()} == {
        file: list(group) for file, group in expected.tensors.items()
    }
    for file, group in expected.tensors.items():
        for name, tensor in group.items():
            assert torch.equal(end.tensors[file][name], tensor), f"{file} {name}"
    assert curve(folder) == curve(whole)


def curve(folder: Path) -> list[dict[str, object]]:
    times = ("time", "train/tokens_per_second")
    return [
        {key: value for key, value in line.items() if key not in times}
        for line in read_log(folder / "log.jsonl")
    ]
