"""What is wrong with a run on ranks is said once, with field and ranks, and all end within a minute."""

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sparsegate.data import Dataset
from sparsegate.training.overrides import to_json
from sparsegate.training.storage import write_json_atomically
from tests.helpers.runs import LINES, make_dataset, make_run

WITHIN_S = 60
TRAIN = f"{shlex.quote(sys.executable)} -m sparsegate train small-moe-32 --out run --training.device cpu"


@dataclass(frozen=True)
class Bad:
    """A command of each rank, and what is said."""

    command: str
    said: str
    launcher: str = "torchrun"


BAD = {
    "fewer experts than ranks": Bad(
        f"{TRAIN} --data data --model.num-experts 2 --model.k 2",
        r"ranks that share the experts \(3\) must not exceed num_experts \(2\)",
    ),
    "another configuration": Bad(
        f"{TRAIN} --data data --seed $((1 + RANK / 2))", r"seed \(2 on rank 2, 1 on rank 0\) must be the same"
    ),
    "another dataset": Bad(
        f"{TRAIN} --data data$((RANK / 2))", r"data_fingerprint \(\w+ on rank 2, \w+ on rank 0\)"
    ),
    "a dataset that one rank lacks": Bad(
        f"{TRAIN} --data $([ $RANK = 1 ] && echo nowhere || echo data)", r"rank 1: nowhere"
    ),
    "a run of another model": Bad(
        f"{TRAIN} --data data --out other --resume --model.hidden 16", r"model\.hidden \(16\) is 8 in other"
    ),
    "a checkpoint of another model": Bad(
        f"{TRAIN} --data data --out mixed --resume", r"checkpoint: .* has shape .*, this model's has"
    ),
    "nobody to meet": Bad(
        f"env RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=9 {TRAIN} --data data",
        r"MASTER_ADDR:MASTER_PORT \(127\.0\.0\.1:9\): rank 1 of 2 cannot meet",
        launcher="",
    ),
    "ranks that do not come": Bad(
        f"env RANK=0 WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=0 {TRAIN} --data data",
        r"WORLD_SIZE \(3\): rank 1, 2 did not come within 40 s",
        launcher="",
    ),
    "no launcher": Bad(
        f"env WORLD_SIZE=2 {TRAIN} --data data", r"RANK \(not set\) must be a number", launcher=""
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two datasets, a run, and a run with a checkpoint of another one."""
    folder = tmp_path_factory.mktemp("bad")
    for name, lines in (("data", LINES), ("data0", LINES), ("data1", LINES[:200])):
        dataset = make_dataset(folder / f"{name}-text", lines=lines)
        dataset.directory.rename(folder / name)
    for name, hidden in (("other", 8), ("mixed", 16)):
        run = make_run(folder / name, Dataset.open(folder / "data"))
        model = replace(run.model, hidden=hidden)
        write_json_atomically(
            folder / name / "config.json",
            to_json(replace(run, name="small-moe-32", data="data", model=model)),
        )
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_once_and_all_ranks_end(what, folder):
    bad = BAD[what]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        "--no-python",
    ]
    started = time.monotonic()
    ended = subprocess.run(
        [*(launcher if bad.launcher else []), "bash", "-c", f"exec {bad.command}"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=4 * WITHIN_S,
    )
    seconds = time.monotonic() - started
    print(f"{what}: {seconds:.0f} s, code {ended.returncode}")
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("sparsegate train:")]
    assert len(said) == 1, ended.stderr
    assert re.search(bad.said, said[0]), said[0]
    assert seconds < WITHIN_S
