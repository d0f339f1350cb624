"""Prints the most memory that saving, resuming and loading a run take, in a process with nothing else.

python -m tests.helpers.checkpoint_memory FOLDER NUM_EXPERTS
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import sparsegate
from sparsegate.training.checkpoint import latest_checkpoint
from sparsegate.training.config import OptimConfig, RunConfig
from sparsegate.training.loop import train
from sparsegate.training.making import make_state
from sparsegate.training.run_folder import checkpoints_of, read_run_config
from tests.helpers.runs import make_dataset
from tests.helpers.tiny_runs import tiny_run

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    """One expert has 2 MiB of weights."""
    folder, num_experts = Path(sys.argv[1]), int(sys.argv[2])
    config = tiny_run(make_dataset(folder / "text").directory, steps=1)
    model = replace(config.model, width=128, lstm_units=128, hidden=2048, num_experts=num_experts)
    optim = OptimConfig(experts="factored", in_backward=True)
    run = folder / "run"
    train(replace(config, model=model, optim=optim), folder=run)
    config = read_run_config(run)
    weights, saving = save(config, folder / "saved")

    def resume() -> None:
        path = latest_checkpoint(checkpoints_of(run))
        assert path is not None
        make_state(config).load(path)

    found = {"save": saving, "resume": peak(resume), "load": peak(lambda: sparsegate.load(run))}
    print(json.dumps({name: most / weights for name, most in found.items()} | {"weights": weights}))


def save(config: RunConfig, folder: Path) -> tuple[int, int]:
    """Bytes of a fresh model's weights, and at most beside it while it is saved."""
    state = make_state(config)
    return sum(p.nbytes for p in state.model.parameters()), peak(lambda: state.save(folder, keep=()))


def peak(function: Callable[[], object]) -> int:
    """Bytes at most beyond those that were there."""
    gc.collect()
    before = _bytes("VmRSS")
    RESET.write_text("5")  # the peak begins anew
    function()
    return _bytes("VmHWM") - before


def _bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
