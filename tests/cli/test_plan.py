"""`sparsegate plan`."""

import json

import pytest

from sparsegate.cli.main import main
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import recipe

Capture = pytest.CaptureFixture[str]


def test_json_is_one_object_of_integers(capsys: Capture):
    assert main(["plan", "moe-32", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert list(counted) == [
        "parameters",
        "parameters_without_embedding_and_softmax",
        "ops_per_timestep",
        "ops_per_timestep_with_softmax",
    ]
    assert all(type(value) is int for value in counted.values())
    assert counted == vars(plan(recipe("moe-32").model))


def test_fields_of_the_recipe_can_be_changed(capsys: Capture):
    assert main(["plan", "moe-32", "--json", "--model.num-experts", "64"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert main(["plan", "moe-32", "--json"]) == 0
    assert more["parameters"] - json.loads(capsys.readouterr().out)["parameters"] == 32 * 2 * 512 * (1024 + 1)


@pytest.mark.parametrize("name", ["moe-256", "translation-moe-512-h"])
def test_people_read_the_same_numbers(name: str, capsys: Capture):
    assert main(["plan", name]) == 0
    shown = capsys.readouterr().out
    for value in vars(plan(recipe(name).model)).values():
        assert f"{value:,}" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moe-33"], "moe-33: no such recipe; did you mean moe-32?"),
        (["translation-moe-33"], "translation-moe-33: no such recipe; did you mean translation-moe-32?"),
        (
            ["translation-moe-32", "--model.decoder-block.k", "33"],
            "decoder_block.k (33) must be between 1 and num-experts (32)",
        ),
        (["moe-32", "--model.num-expert", "8"], "--model.num-expert: no such option; did you mean"),
        (["moe-32", "--model.k", "33"], "model.k (33) must be between 1 and model.num-experts (32)"),
        (["moe-32", "--model.hidden", "many"], "model.hidden (many)"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(words: list[str], message: str, capsys: Capture):
    assert main(["plan", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert message in told.err
