"""The mean of several checkpoints' weights, as a run of its own."""

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ..data import save_vocabulary
from ..data.files import new_directory
from .checkpoint import Checkpoint, checkpoint_name, load_checkpoint, save_checkpoint
from .overrides import to_json
from .run_folder import CONFIG, VOCABULARY, checkpoints_of, read_run_config, read_vocabulary, saved_steps
from .storage import write_json_atomically


def steps_to_average(run: Path, *, last: int | None, steps: Sequence[int]) -> list[int]:
    """Steps of which a run has a checkpoint, ascending: those named, or else the newest. None: all.

    ValueError: there is no such checkpoint, or there are fewer.
    """
    read_run_config(run)
    there = sorted(saved_steps(run))
    known = ", ".join(map(str, there)) or "none"
    for step in steps:
        if step not in there:
            raise ValueError(f"{run}: has no checkpoint of step {step}; there are: {known}")
    if steps:
        return sorted(set(steps))
    if last is not None and not 1 <= last <= len(there):
        raise ValueError(
            f"last ({last}) must be from 1 to the number of checkpoints in {run}; there are: {known}; train "
            "with a greater training.keep-checkpoints"
        )
    if not there:
        raise ValueError(f"{run}: has no checkpoint yet; train it for longer")
    if last is None and len(there) == 1:
        raise ValueError(
            f"{run}: has one checkpoint alone, of step {there[0]}, and no mean of several; train it for "
            "longer, or with a greater training.keep-checkpoints"
        )
    return there if last is None else there[-last:]


def average(run: Path, *, steps: Sequence[int], output: Path) -> None:
    """Make the folder `output` a run whose one checkpoint holds the means of the weights at these steps.

    It appears whole or not at all. `average.json` in it tells what it was made of. The checkpoint has the
    step and the counters of the last one; there is no optimizer's state in it.

    Raises:
        ValueError, OSError: one line: `output` exists, or a checkpoint is damaged.
    """
    config = read_run_config(run)
    vocabulary = read_vocabulary(run, config)
    with new_directory(output, key=secrets.token_hex(8)) as folder:
        last, *others = (checkpoints_of(run) / checkpoint_name(step) for step in sorted(steps, reverse=True))
        newest = load_checkpoint(last, only=["model"])
        weights = _mean_weights(newest, (load_checkpoint(path, only=["model"]) for path in others))
        write_json_atomically(folder / CONFIG, to_json(config))
        save_vocabulary(vocabulary, folder / VOCABULARY)
        write_json_atomically(folder / "average.json", {"run": str(run), "steps": list(steps)})
        save_checkpoint(
            checkpoints_of(folder),
            step=newest.step,
            tensors={"model": weights, "optimizer": {}, "state": {}},
            state=newest.state | {"best_step": 0, "best_nll": 0.0},
            keep=(),
        )


def _mean_weights(first: Checkpoint, others: Iterable[Checkpoint]) -> dict[str, Tensor]:
    """The means of all weights, summed in float64. One checkpoint of `others` is in memory at a time."""
    sums = {name: value.double() for name, value in first.tensors["model"].items()}
    num_checkpoints = 1
    for checkpoint in others:
        num_checkpoints += 1
        for name, value in checkpoint.tensors["model"].items():
            sums[name] += value
    return {
        name: (sums[name] / num_checkpoints).to(value.dtype) for name, value in first.tensors["model"].items()
    }
