"""The state of a run comes back from a checkpoint bit for bit; weights that do not fit are refused."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sparsegate.training.checkpoint import load_checkpoint
from sparsegate.training.config import RunConfig
from sparsegate.training.loop import train
from sparsegate.training.making import make_state
from sparsegate.training.state import TrainState, load_weights
from sparsegate.training.tasks import open_task
from tests.helpers.tiny_runs import TINY_DATASETS, TINY_RUNS

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=TINY_RUNS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    dataset = TINY_DATASETS[request.param](tmp_path_factory.mktemp("text") / "text")
    return open_task(TINY_RUNS[request.param](dataset.directory, steps=3)).config


@pytest.fixture
def trained(config: RunConfig, tmp_path: Path) -> TrainState:
    return train(config, folder=tmp_path / "run").state


def tensors_of(state: TrainState) -> Tensors:
    """Weights, Adam's state under the names of the parameters, carried LSTM state."""
    found = dict(state.model.state_dict())
    for name, parameter in state.model.named_parameters():
        for optimizer in state.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value
    for name, pair in state.carried.items():
        found |= {f"{name}.{part}": value for part, value in zip("hc", pair, strict=True)}
    return found


@pytest.mark.parametrize("experts", ["adam", "factored"])
def test_what_is_restored_is_what_was_saved(config: RunConfig, tmp_path: Path, experts: str):
    config = replace(config, optim=replace(config.optim, experts=experts))
    trained = train(config, folder=tmp_path / "run").state
    path = trained.save(tmp_path / "checkpoints", keep=())
    fresh = make_state(replace(config, seed=99))
    own = [value.data_ptr() for value in fresh.model.state_dict().values()]
    fresh.load(path)
    assert own == [value.data_ptr() for value in fresh.model.state_dict().values()]
    saved, restored = tensors_of(trained), tensors_of(fresh)
    of_experts = {"row", "col", "last"} if experts == "factored" else {"exp_avg", "exp_avg_sq"}
    keys = {key.rpartition("/")[2] for key in saved if "/" in key}
    assert keys == {"step", "exp_avg", "exp_avg_sq"} | of_experts
    in_experts = {key.rpartition("/")[2] for key in saved if ".experts." in key and "/" in key}
    assert in_experts == {"step"} | of_experts
    carried = {"lstm1.h", "lstm1.c", "lstm2.h", "lstm2.c"} if config.model.kind == "mixture" else set()
    assert {name for name in saved if name.endswith((".h", ".c"))} == carried
    assert saved.keys() == restored.keys()
    for name, value in saved.items():
        assert torch.equal(value, restored[name]), name
        assert value.dtype == restored[name].dtype, name
    assert asdict(fresh.progress) == asdict(trained.progress)
    assert fresh.progress.step == 3


def test_a_fresh_state_has_nothing_to_carry_and_comes_back_as_fresh(config: RunConfig, tmp_path: Path):
    state = make_state(config)
    other = make_state(replace(config, seed=99))
    other.restore(load_checkpoint(state.save(tmp_path, keep=())))
    assert other.carried == {}
    assert all(optimizer.state == {} for optimizer in other.optimizers)
    assert all(
        torch.equal(value, other.model.state_dict()[n]) for n, value in state.model.state_dict().items()
    )


def test_saving_changes_nothing(trained: TrainState, tmp_path: Path):
    before = {name: value.clone() for name, value in tensors_of(trained).items()}
    trained.save(tmp_path, keep=())
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(trained).items())


def without_one(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != "softmax.bias"}


def with_another_shape(tensors: Tensors) -> Tensors:
    return tensors | {"softmax.bias": tensors["softmax.bias"][:-1]}


def with_one_more(tensors: Tensors) -> Tensors:
    return tensors | {"softmax.scale": torch.ones(1)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_one, "softmax.bias is missing"),
        (with_one_more, "softmax.scale is unknown to this model"),
        (with_another_shape, "softmax.bias has shape"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_leave_the_model_as_it_was(
    config: RunConfig, spoil: Callable[[Tensors], Tensors], message: str
):
    model, other = make_state(config).model, make_state(replace(config, seed=99)).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^file: {re.escape(message)}") as refused:
        load_weights(model, spoil(other.state_dict()), where="file")
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
