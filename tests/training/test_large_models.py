"""What lets large models train: experts updated in backward and kept in bfloat16, tables updated by rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsegate.models.layers import Recurrent
from sparsegate.models.memory import training_memory
from sparsegate.recipes.registry import recipe
from sparsegate.training import memory
from sparsegate.training.checkpoint import latest_checkpoint, load_checkpoint
from sparsegate.training.config import OptimConfig, RunConfig
from sparsegate.training.loop import train
from sparsegate.training.making import with_optimizers
from sparsegate.training.ranks import Ranks
from sparsegate.training.run_folder import checkpoints_of
from sparsegate.training.step import NonFinite, apply_gradient
from tests.helpers.runs import make_dataset, make_translation_dataset
from tests.helpers.tiny_runs import tiny_run, tiny_translation_run
from tests.training.test_loop import Planted, assert_equal, everything, with_training
from tests.training.test_step import batch, gradient_of, model
from tests.training.test_step import config as step_config

LARGE = {"experts": "factored", "in_backward": True, "rounding": "stochastic", "tables": "rows"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("text") / "language").directory


@pytest.fixture
def config(data: Path) -> RunConfig:
    return with_optim(tiny_run(data, steps=12), experts="factored")


def with_optim(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, optim=replace(config.optim, **changes))


def large(config: RunConfig) -> RunConfig:
    """All options for large models at once."""
    narrow = replace(config.model, expert_dtype="bfloat16", softmax_samples=9)
    return with_optim(replace(config, model=narrow), **LARGE)


@pytest.mark.parametrize("stop_at", [1, 7])
def test_a_large_models_run_in_two_parts_ends_bit_for_bit_as_in_one(config, tmp_path: Path, stop_at: int):
    config = large(config)
    whole = train(config, folder=tmp_path / "whole")
    train(with_training(config, steps=stop_at), folder=tmp_path / "parts")
    assert_equal(train(config, folder=tmp_path / "parts", resume=True), whole)
    found = everything(whole)
    assert found["model/layers.moe.moe.experts.w_in"].dtype == torch.bfloat16
    assert found["optimizer/2/0/row"].dtype == torch.float32
    assert found["optimizer/1/0/count"].dtype == torch.int32


def test_a_large_translation_model_does_as_well(tmp_path: Path):
    config = tiny_translation_run(make_translation_dataset(tmp_path / "text").directory, steps=6)
    block = replace(config.model.encoder_block, expert_dtype="bfloat16")
    config = with_optim(config, **{**LARGE, "tables": "adam"})
    config = replace(config, model=replace(config.model, encoder_block=block, decoder_block=block))
    whole = train(config, folder=tmp_path / "whole")
    train(with_training(config, steps=2), folder=tmp_path / "parts")
    assert_equal(train(config, folder=tmp_path / "parts", resume=True), whole)


def test_updating_in_backward_is_a_backward_pass_and_then_a_step(config: RunConfig, tmp_path: Path):
    """As long as nothing is clipped."""
    config = with_optim(config, clip_norm=1e9)
    plain = everything(train(config, folder=tmp_path / "plain"))
    sunk = everything(train(with_optim(config, in_backward=True), folder=tmp_path / "sunk"))
    for name, value in plain.items():
        torch.testing.assert_close(sunk[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e37])
def test_a_batch_without_a_finite_loss_or_gradient_leaves_a_large_model_as_it_was(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
):
    """1e37: the loss is finite, the gradient that reaches the experts is not."""
    config = large(config)
    spared = train(with_training(config, skip_batches=(4,)), folder=tmp_path / "spared")
    Planted(monkeypatch, at={4}, factor=factor)
    result = train(config, folder=tmp_path / "bad")
    assert result.state.progress.skipped == 1
    assert_equal(result, spared)


def test_a_gradient_that_fails_when_experts_are_updated_stops_the_run_and_leaves_its_checkpoint(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Below the mixture stands an LSTM, whose gradient is made after that of the experts."""
    forward, calls = Recurrent.forward, [0]

    def spoiled(layer: Recurrent, x_BSD: torch.Tensor, *rest: Any) -> Any:
        calls[0] += layer.training
        if layer.training and calls[0] == 2 * 7 + 1 and x_BSD.requires_grad:
            x_BSD.register_hook(lambda grad: grad * torch.nan)
        return forward(layer, x_BSD, *rest)

    monkeypatch.setattr(Recurrent, "forward", spoiled)
    with pytest.raises(NonFinite, match=r"batch 7 .*checkpoint is intact.*training\.skip-batches 7"):
        train(large(config), folder=tmp_path / "run")
    newest = latest_checkpoint(checkpoints_of(tmp_path / "run"))
    assert newest is not None
    assert load_checkpoint(newest).step == 5


def test_rows_of_tables_count_in_the_norm_and_are_clipped_as_if_they_stood_in_full_gradients():
    run = with_optim(step_config(), experts="factored", tables="rows")
    run = replace(run, model=replace(run.model, softmax_samples=5))
    found = []
    for tables in ("adam", "rows"):
        built = model()
        built.softmax.num_samples = 5
        state = with_optimizers(built, with_optim(run, tables=tables))
        gradient = gradient_of(built, batch(), {}, run)
        grads = {name: p.grad.clone() for name, p in built.named_parameters()}
        apply_gradient(built, [], gradient, learning_rate=1.0, clip_norm=0.01)
        clipped = {name: p.grad.to_dense() for name, p in built.named_parameters()}
        found.append((gradient.norm, grads, clipped))
        assert len(state.optimizers) == 2 + (tables == "rows")
    (norm, grads, clipped), (sparse_norm, sparse_grads, sparse_clipped) = found
    assert sparse_norm == pytest.approx(norm, rel=1e-12)
    assert {name for name, grad in sparse_grads.items() if grad.is_sparse} == {
        "embedding.weight",
        "softmax.weight",
    }
    for name, grad in grads.items():
        torch.testing.assert_close(sparse_grads[name].to_dense(), grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(sparse_clipped[name], clipped[name], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(clipped[name], grad * 0.01 / norm, rtol=1e-4, atol=1e-12)


def test_with_a_full_softmax_only_the_embedding_is_a_table_of_rows(config: RunConfig, tmp_path: Path):
    result = train(with_optim(config, tables="rows"), folder=tmp_path / "run")
    (first, *others) = result.state.optimizers[1].param_groups[0]["params"]
    assert first is result.state.model.embedding.weight
    assert not others


def test_experts_that_had_no_token_are_not_read(config: RunConfig, tmp_path: Path):
    """Of each expert there is the step at which it last had some."""
    config = replace(config, model=replace(config.model, num_experts=64))
    state = train(with_training(config, steps=3), folder=tmp_path / "run").state
    assert state.factored is not None
    last_E = state.factored.state[state.model.layers["moe"].moe.experts.w_in]["last"]
    assert 0 < (last_E < 3).sum() < 64


def test_an_optimizer_does_not_go_on_from_the_state_of_another(config: RunConfig, tmp_path: Path):
    train(with_training(config, steps=2), folder=tmp_path / "run")
    for changes in ({"experts": "adam"}, {"tables": "rows"}):
        with pytest.raises(
            ValueError, match=f"optim.{next(iter(changes))} .*a run goes on only as what it was"
        ):
            train(with_optim(config, **changes), folder=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("optim", "others", "message"),
    [
        ({"in_backward": True}, {}, r"optim.in-backward \(true\) must be false, or optim.experts factored"),
        ({"rounding": "stochastic"}, {}, r"optim.rounding \(stochastic\) must be nearest, or optim.experts"),
        (
            {"experts": "factored", "in_backward": True},
            {"micro_batches": 2},
            r"training.micro-batches \(2\) must be 1 with optim.in-backward",
        ),
        (
            {},
            {"expert_dtype": "bfloat16"},
            r"optim.experts \(adam\) must be factored with model.expert-dtype",
        ),
    ],
)
def test_options_that_need_others_say_so(data: Path, optim: Any, others: Any, message: str):
    config = tiny_run(data)
    with pytest.raises(ValueError, match=message):
        config = replace(
            config,
            optim=OptimConfig(**optim),
            training=replace(config.training, micro_batches=others.get("micro_batches", 1)),
            model=replace(config.model, expert_dtype=others.get("expert_dtype", "float32")),
        )


def test_a_model_larger_than_what_is_free_is_refused_with_both_figures_before_anything_is_made(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 10)
    with pytest.raises(
        ValueError, match=r"^model: training it takes about .* GiB, and 0.0 GiB are free; use "
    ):
        train(config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ranks_of_one_machine_share_its_memory_and_take_their_part_each(monkeypatch: pytest.MonkeyPatch):
    config, ranks = recipe("small-moe-256"), Ranks(rank=1, num_ranks=4, mesh=None)
    method = replace(memory.method_of(config), devices=4, tokens=256)
    needed = training_memory(config.model, method).peak
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * needed)
    memory.require_memory_for(config, ranks)
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * needed - 2)
    with pytest.raises(ValueError, match=r"^model: training it takes about"):
        memory.require_memory_for(config, ranks)
