"""The models of a study do equal numbers of multiply-adds, and no mixture does more than the dense models."""

from dataclasses import replace

import pytest

from sparsegate.models import MixtureLM
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import recipe
from sparsegate.recipes.study.ladder import SCALES, budget_of, for_study, member

LADDERS = [(scale, name) for scale, defaults in SCALES.items() for name in defaults.models]


def ops_by_formula(model: MixtureLM, num_groups: int | None) -> int:
    """Two LSTMs, k experts, and the clean half of the gate with its noise: the paper's accounting."""
    width, experts = model.width, model.num_experts
    gate = 2 * width * experts
    if num_groups is not None:
        gate = 2 * width * num_groups + 2 * 2 * width * (experts // num_groups)
    return 2 * 8 * width**2 + 4 * 2 * width * model.hidden + gate


@pytest.mark.parametrize(("scale", "name"), LADDERS)
def test_no_model_of_a_ladder_does_more_than_the_first_nor_much_less(scale: str, name: str):
    budget = budget_of(SCALES[scale])
    ops = plan(member(name, budget=budget, gates="within").model).ops_per_timestep
    assert 0.97 * budget <= ops <= budget


@pytest.mark.parametrize(("scale", "name"), [pair for pair in LADDERS if "moe-" in pair[1]])
def test_experts_are_narrower_by_what_their_gate_costs_and_no_more(scale: str, name: str):
    budget = budget_of(SCALES[scale])
    model = member(name, budget=budget, gates="within").model
    if not isinstance(model, MixtureLM):
        return
    groups = getattr(model.gate, "num_groups", None)
    ops = plan(model).ops_per_timestep
    assert ops == ops_by_formula(model, groups)
    wider = replace(model, hidden=model.hidden + 8)
    assert ops_by_formula(wider, groups) > budget
    assert model.hidden % 8 == 0
    assert model == replace(recipe(name).model, hidden=model.hidden)


def test_gates_on_top_leave_the_papers_models_as_they_are():
    budget = budget_of(SCALES["gpu"])
    for name in SCALES["gpu"].models:
        assert member(name, budget=budget, gates="on-top") == recipe(name)


@pytest.mark.parametrize("gates", ["within", "on-top"])
def test_a_model_of_another_cost_is_refused_with_the_figures(gates):
    message = r"models \(lstm-2048-512\): does 9,437,184 multiply-adds for each word, .* at 8,388,608"
    with pytest.raises(ValueError, match=message):
        member("lstm-2048-512", budget=8_388_608, gates=gates)


def test_a_gate_that_costs_too_much_on_top_is_refused():
    with pytest.raises(ValueError, match="small-moe-4096-h"):
        member("small-moe-4096-h", budget=budget_of(SCALES["laptop"]), gates="on-top")


def test_studies_train_with_the_full_softmax():
    scale, config = SCALES["gpu"], recipe("moe-4")
    assert config.model.softmax_samples > 0
    assert for_study(config, scale, batches=scale.batches, dropout=0.0).model.softmax_samples == 0
