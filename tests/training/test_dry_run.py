"""Runs of many ranks that are not there: who holds which experts, and how many bytes."""

from dataclasses import replace

import pytest
import torch

from sparsegate.models.memory import training_memory
from sparsegate.recipes.registry import recipe
from sparsegate.training import dry_run as module
from sparsegate.training.dry_run import DryRun, dry_run, experts_held, fake_rank, require_one_rank_each
from sparsegate.training.making import make_model
from sparsegate.training.memory import method_of
from sparsegate.training.overrides import replace_by_path

LARGEST = recipe("news-moe-131072-h")
FACTORED = replace_by_path(LARGEST, {"optim.experts": "factored"})


@pytest.mark.parametrize("config", [LARGEST, FACTORED], ids=["adam", "factored"])
def test_128_ranks_hold_each_expert_once_and_the_bytes_that_are_planned(config):
    found = dry_run(config, num_ranks=128)
    assert (found.experts, found.fewest_experts, found.most_experts) == (131_072, 1024, 1024)
    found.require(training_memory(config.model, replace(method_of(config), devices=128)))
    gates = 2 * 512 * (256 + 256 * 512)  # and their noise
    others = 2 * 8 * 512**2 + gates + 2 * 100_000 * 512 + 100_000
    assert found.weights == 4 * (1024 * 2 * 512 * 1024 + others)


def test_of_1024_ranks_each_allocates_its_own_experts_alone():
    for rank in (0, 1, 700, 1023):
        with fake_rank(rank, 1024) as ranks:
            model = make_model(LARGEST, ranks, device=torch.device("meta"))
        assert list(experts_held(model).values()) == [128]
        assert {len(p) for p in model.expert_parameters()} == {128}


@pytest.mark.nightly
def test_1024_ranks_hold_each_expert_once_and_the_bytes_that_are_planned():
    found = dry_run(LARGEST, num_ranks=1024)
    assert (found.experts, found.fewest_experts, found.most_experts) == (131_072, 128, 128)
    found.require(training_memory(LARGEST.model, replace(method_of(LARGEST), devices=1024)))


def test_experts_that_do_not_divide_are_as_planned_on_the_rank_with_most():
    found = dry_run(recipe("moe-32"), num_ranks=7)
    assert (found.experts, found.fewest_experts, found.most_experts) == (32, 4, 5)
    found.require(training_memory(recipe("moe-32").model, replace(method_of(recipe("moe-32")), devices=7)))


def test_copies_of_the_experts_are_each_whole_and_as_planned():
    config = replace_by_path(recipe("moe-32"), {"training.expert_copies": 3})
    found = dry_run(config, num_ranks=12)
    assert (found.ranks, found.experts, found.fewest_experts, found.most_experts) == (12, 32, 8, 8)
    found.require(training_memory(config.model, replace(method_of(config), devices=4)))
    with pytest.raises(ValueError, match=r"training\.expert-copies \(3\) must divide the number of"):
        dry_run(config, num_ranks=7)


def test_words_that_are_spread_are_as_planned():
    config = replace_by_path(recipe("moe-32"), {"training.vocabulary": "sharded"})
    found = dry_run(config, num_ranks=7)
    found.require(training_memory(config.model, replace(method_of(config), devices=7)))
    words, whole = -(-793_471 // 7), dry_run(recipe("moe-32"), num_ranks=7)
    assert whole.weights - found.weights == 4 * (793_471 - words) * (2 * 512 + 1)


def test_a_dense_model_is_whole_on_every_rank():
    found = dry_run(recipe("4xlstm-512"), num_ranks=3)
    assert (found.experts, found.most_experts) == (0, 0)
    found.require(training_memory(recipe("4xlstm-512").model, method_of(recipe("4xlstm-512"))))


def test_an_expert_that_no_rank_has_or_two_have_is_found():
    require_one_rank_each("moe", [3, 2, 2])
    for held in ([2, 3, 2], [3, 2, 1, 1], [2, 2, 4]):
        with pytest.raises(ValueError, match=r"moe: tokens for \d experts go to rank \d, which holds \d"):
            require_one_rank_each("moe", held)


def test_a_rank_that_makes_too_many_is_found(monkeypatch: pytest.MonkeyPatch):
    made = []

    def one_too_many(model):
        made.append(model)
        return {name: number + (len(made) == 7) for name, number in experts_held(model).items()}

    monkeypatch.setattr(module, "experts_held", one_too_many)
    with pytest.raises(ValueError, match=r"layers\.moe\.moe\.experts: tokens for"):
        dry_run(recipe("moe-32"), num_ranks=7)


def test_bytes_that_are_not_planned_are_found():
    config = recipe("moe-32")
    planned = training_memory(config.model, replace(method_of(config), devices=4))
    found = DryRun(
        ranks=4,
        experts=32,
        fewest_experts=8,
        most_experts=8,
        weights=planned.weights,
        gradients=planned.gradients + 4,
        optimizer=planned.optimizer,
    )
    with pytest.raises(ValueError, match=r"gradients: a rank has [\d,]+ bytes, where [\d,]+ are planned"):
        found.require(planned)


def test_gradients_that_depend_on_the_text_are_refused():
    config = replace_by_path(recipe("moe-32"), {"optim.tables": "rows"})
    with pytest.raises(ValueError, match=r"optim\.tables \(rows\): gradients depend on the text"):
        dry_run(config, num_ranks=2)


def test_more_ranks_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"ranks that share the experts \(33\) must not exceed num_experts"):
        dry_run(recipe("moe-32"), num_ranks=33)


def test_an_adaptive_softmax_whose_words_are_spread_is_refused():
    config = replace_by_path(
        recipe("moe-32"),
        {"training.vocabulary": "sharded", "model.softmax_cutoffs": (1000,), "model.softmax_samples": 0},
    )
    with pytest.raises(ValueError, match=r"training\.vocabulary \(sharded\) must be replicated with model"):
        dry_run(config, num_ranks=2)
