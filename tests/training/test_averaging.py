"""The mean of checkpoints: of every weight, in a run that appears whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsegate import load
from sparsegate.training.averaging import average, steps_to_average
from sparsegate.training.checkpoint import checkpoint_name, load_checkpoint
from sparsegate.training.run_folder import checkpoints_of, saved_steps
from tests.helpers.runs import make_dataset, make_run, make_translation_dataset, make_translation_run

STEPS = (10, 20, 40)


def language(folder: Path) -> Path:
    make_run(folder / "run", make_dataset(folder / "text"), steps=STEPS)
    return folder / "run"


def translation(folder: Path) -> Path:
    make_translation_run(folder / "run", make_translation_dataset(folder / "text"), steps=STEPS)
    return folder / "run"


RUNS = [language, translation]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints_of(run) / checkpoint_name(step)).tensors["model"]


@pytest.mark.parametrize("make", RUNS)
def test_every_weight_is_the_mean_and_the_run_can_be_loaded(make: Callable[[Path], Path], tmp_path: Path):
    run, mean = make(tmp_path), tmp_path / "mean"
    average(run, steps=[10, 40], output=mean)
    assert saved_steps(mean) == [40]
    first, last, found = weights(run, 10), weights(run, 40), weights(mean, 40)
    assert found.keys() == first.keys()
    for name, value in found.items():
        expected = ((first[name].double() + last[name].double()) / 2).to(value.dtype)
        assert torch.equal(value, expected), name
    loaded = load(mean)
    assert loaded.step == 40
    assert torch.equal(loaded.model.state_dict()["softmax.bias"], found["softmax.bias"])


def test_the_mean_of_one_is_that_one(tmp_path: Path):
    run = language(tmp_path)
    average(run, steps=[20], output=tmp_path / "mean")
    assert all(torch.equal(v, weights(run, 20)[n]) for n, v in weights(tmp_path / "mean", 20).items())


def test_nothing_is_overwritten_and_a_damaged_checkpoint_leaves_nothing(tmp_path: Path):
    run, mean = language(tmp_path), tmp_path / "mean"
    average(run, steps=[10, 20], output=mean)
    before = weights(mean, 20)
    with pytest.raises(FileExistsError, match="exists already"):
        average(run, steps=[20, 40], output=mean)
    assert all(torch.equal(v, before[n]) for n, v in weights(mean, 20).items())
    file = checkpoints_of(run) / checkpoint_name(20) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        average(run, steps=[20, 40], output=tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mean", "run", "text"]


def test_which_checkpoints(tmp_path: Path):
    run = language(tmp_path)
    assert steps_to_average(run, last=None, steps=[]) == [10, 20, 40]
    assert steps_to_average(run, last=2, steps=[]) == [20, 40]
    assert steps_to_average(run, last=None, steps=[40, 10, 40]) == [10, 40]
    with pytest.raises(ValueError, match=r"has no checkpoint of step 30; there are: 10, 20, 40"):
        steps_to_average(run, last=None, steps=[10, 30])
    for last in (0, 4):
        with pytest.raises(ValueError, match=rf"^last \({last}\) must be from 1 .* there are: 10, 20, 40"):
            steps_to_average(run, last=last, steps=[])
    with pytest.raises(ValueError, match="not a run"):
        steps_to_average(tmp_path / "text", last=None, steps=[])
