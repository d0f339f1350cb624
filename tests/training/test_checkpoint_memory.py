"""A model whose weights are most of the memory is saved, resumed and loaded without a second copy of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import checkpoint_memory


@pytest.mark.skipif(not checkpoint_memory.RESET.exists(), reason="only Linux tells a process's peak")
@pytest.mark.parametrize(
    ("num_experts", "least"), [(100, 200e6), pytest.param(750, 1.5e9, marks=pytest.mark.nightly)]
)
def test_weights_are_in_memory_once(num_experts: int, least: float, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.checkpoint_memory", str(tmp_path), str(num_experts)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": ":".join(path for path in sys.path if path),
            # What is freed goes back to the system at once, and is not counted as held.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > least
    assert found["save"] < 0.2
    assert 1 <= found["resume"] < 1.2
    assert 1 <= found["load"] < 1.2
