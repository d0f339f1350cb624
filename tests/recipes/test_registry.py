"""Recipes: each has its name, builds, and survives its way to JSON and back."""

import re

import pytest

from sparsegate.models import build
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import RECIPES, recipe
from sparsegate.training.config import RunConfig, SentencesConfig
from sparsegate.training.overrides import from_json, to_json

PAPER = ("moe-4", "moe-32", "moe-256", "moe-1-wide", "moe-1-deep", "4xlstm-512", "lstm-2048-512")


def test_the_rows_of_table_7_are_there():
    assert set(PAPER) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_name_and_builds_on_the_meta_device(name: str):
    config = recipe(name)
    assert config.name == name
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert {p.device.type for p in build(config.model, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_the_same_after_json(name: str):
    assert from_json(RunConfig, to_json(recipe(name))) == recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_runs_at_the_papers_vocabularies_sample_8192_words_and_others_none(name: str):
    model = recipe(name).model
    samples = 8192 if model.kind != "translation" and model.vocab_size >= 100_000 else 0
    assert model.softmax_samples == model.sampled_words == samples


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_are_as_the_paper_says(name: str):
    config = recipe(name)
    assert config.model.vocab_size == 793_471
    assert config.model.dropout == 0.1
    assert config.optim.warmup_steps == 1000
    assert config.training.steps == 27_000
    assert config.losses.importance == config.losses.load == 0.1
    assert isinstance(config.batches, SentencesConfig)
    assert config.batches.batch_words == 300_000


def test_the_small_models_cost_the_same_as_each_other():
    ops = {
        name: plan(recipe(name).model).ops_per_timestep for name in RECIPES if name.startswith("small-moe-1-")
    }
    ops["small-4xlstm"] = plan(recipe("small-4xlstm").model).ops_per_timestep
    assert len(set(ops.values())) == 1, ops
    gates = 2 * 128 * 32
    assert plan(recipe("small-moe-32").model).ops_per_timestep == ops["small-4xlstm"] + gates


def test_a_name_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"^small-moe-33: no such recipe; did you mean small-moe-32\? \(there are:"
    ):
        recipe("small-moe-33")
