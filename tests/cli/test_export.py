"""One file has the weights of a run, and gives them to another, whatever number of processes either has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparsegate.cli.main import main
from sparsegate.training import loop
from sparsegate.training.checkpoint import load_checkpoint
from sparsegate.training.run_folder import checkpoints_of
from tests.helpers.rank_runs import train_on_rank
from tests.helpers.runs import make_dataset, make_run
from tests.helpers.tiny_runs import tiny_run, with_gates


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = make_dataset(tmp_path_factory.mktemp("data") / "text").directory
    return with_gates(tiny_run(data, steps=2, evaluate_every=2), "noisy_topk")


def test_what_ranks_wrote_goes_into_one_file_and_from_there_into_a_run_on_ranks(
    config, ranks, tmp_path, monkeypatch
):
    run, file = tmp_path / "run", tmp_path / "weights.safetensors"
    ranks.run(train_on_rank, 3, config, str(run))
    assert main(["export", str(run), "--out", str(file)]) == 0
    weights, expected = (
        load_file(file),
        load_checkpoint(checkpoints_of(run) / "step-00000002").tensors["model"],
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["config"])["model"]["num_experts"] == 6
    assert metadata["step"] == "2"
    # At a rate of next to nothing, the weights after a step are those that it began with.
    still = replace(
        config,
        seed=2,
        optim=replace(config.optim, learning_rate=1e-30),
        training=replace(config.training, steps=1, init_from=str(file)),
    )
    assert ranks.run(train_on_rank, 2, still, str(tmp_path / "ranks")) == [""] * 2
    loop.train(still, folder=tmp_path / "alone")
    for folder in ("ranks", "alone"):
        found = load_checkpoint(checkpoints_of(tmp_path / folder) / "step-00000001").tensors["model"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-29)


@pytest.fixture
def run(tmp_path) -> Path:
    make_run(tmp_path / "run", make_dataset(tmp_path / "text"))
    return tmp_path / "run"


@pytest.mark.parametrize(("which", "step"), [("best", 10), ("last", 20), ("20", 20)])
def test_the_checkpoint_that_is_asked_for(which, step, run, capsys):
    assert main(["export", str(run), "--checkpoint", which]) == 0
    expected = load_checkpoint(checkpoints_of(run) / f"step-{step:08d}").tensors["model"]
    found = load_file(run.with_name("run.safetensors"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f"step-{step:08d}" in capsys.readouterr().out


def test_a_file_that_is_there_stays(run, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(["export", str(run), "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine").read_text() == "mine"
    assert "mine: exists; give another name" in capsys.readouterr().err


def test_a_file_of_another_vocabulary_is_refused(config, run, tmp_path):
    main(["export", str(run)])
    other = make_dataset(tmp_path / "other", lines=["other words here"] * 90).directory
    given = replace(
        config,
        data=str(other),
        training=replace(config.training, init_from=str(tmp_path / "run.safetensors")),
    )
    with pytest.raises(ValueError, match="run.safetensors: is of another vocabulary"):
        loop.train(given, folder=tmp_path / "new")
