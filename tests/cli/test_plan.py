"""`sparsegate plan`."""

import json
from typing import Any

import pytest

from sparsegate.cli.main import main
from sparsegate.cli.plan import quantity
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import RECIPES, recipe

Capture = pytest.CaptureFixture[str]


def planned(capsys: Capture, *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_one_object_that_begins_with_the_counts(capsys: Capture):
    counts = vars(plan(recipe("moe-32").model))
    told = planned(capsys, "moe-32")
    assert dict(list(told.items())[: len(counts)]) == counts
    assert all(type(value) is int for value in counts.values())
    assert told["active_parameters"] == told["parameters"] - 28 * 2 * 512 * 1024
    assert told["rows_per_expert"] == 4 * 300_000 / 32
    assert told["multiply_adds_per_number"] == 1024  # section 3.2: the size of the hidden layer
    assert told["memory"]["weights"] == 4 * told["parameters"]
    assert planned(capsys, "moe-32", "--model.experts", "swiglu")["multiply_adds_per_number"] == 1536
    assert "layout" not in told


def test_options_of_training_change_what_it_takes(capsys: Capture):
    plain = planned(capsys, "moe-4096-h")["memory"]
    saving = ["--model.expert-dtype", "bfloat16", "--model.recompute", "true", "--optim.experts", "factored"]
    saving += ["--optim.in-backward", "true", "--optim.tables", "rows"]
    small = planned(capsys, "moe-4096-h", *saving)
    for name in ("experts", "gradients", "optimizer", "peak"):
        assert small["memory"][name] < 0.6 * plain[name]
    assert small["memory"]["activations"] < plain["activations"]
    parts = planned(capsys, "moe-4096-h", "--training.micro-batches", "8")["memory"]
    assert parts["activations"] == pytest.approx(plain["activations"] / 8, rel=0.01)


def test_a_model_is_laid_over_devices_whose_constants_are_printed(capsys: Capture):
    words = ["news-moe-65536-h", "--optim.experts", "factored", "--devices", "64", "--bandwidth", "25GB/s"]
    told = planned(capsys, *words)
    assert told["machine"] == {
        "devices": 64,
        "memory": 80 * 2**30,
        "flops": 989e12,
        "efficiency": 0.5,
        "memory_bandwidth": 3.35e12,
        "bandwidth": 25e9,
    }
    assert told["layout"]["experts_per_device"] == 1024
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert "GiB" in shown
    assert "989T" in shown or "9.89e+14" in shown


def test_a_model_that_is_larger_than_the_memory_is_refused_after_its_figures(capsys: Capture):
    assert main(["plan", "moe-4096-h", "--memory", "24GiB", "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["layout"]["memory"] > 24 * 2**30
    assert told.err.count("\n") == 1
    assert "memory (24.0 GiB) is less than the " in told.err


def test_a_dry_run_makes_every_rank(capsys: Capture):
    words = ["moe-256", "--devices", "12", "--memory", "300GiB", "--dry-run"]
    told = planned(capsys, *words)
    assert told["dry_run"]["experts"] == 256
    assert (told["dry_run"]["most_experts"], told["dry_run"]["fewest_experts"]) == (22, 21)
    assert told["dry_run"]["weights"] == 4 * (told["parameters"] - (256 - 22) * 2 * 512 * 1024)
    assert main(["plan", *words]) == 0
    assert "experts, each on exactly one of them" in capsys.readouterr().out
    assert "dry_run" not in planned(capsys, *words[:-1])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("80GiB", 80 * 2**30),
        ("80 GiB", 80 * 2**30),
        ("450GB/s", 450e9),
        ("989T", 989e12),
        ("1e12", 1e12),
        ("12", 12),
        ("3.5 PFLOP/s", 3.5e15),
        ("64KiB", 65536),
    ],
)
def test_quantities_have_the_prefixes_of_units(text: str, number: float):
    assert quantity(text) == number


def test_fields_of_the_recipe_can_be_changed(capsys: Capture):
    assert main(["plan", "moe-32", "--json", "--model.num-experts", "64"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert main(["plan", "moe-32", "--json"]) == 0
    assert more["parameters"] - json.loads(capsys.readouterr().out)["parameters"] == 32 * 2 * 512 * (1024 + 1)


@pytest.mark.parametrize("columns", ["60", "77", "100"])
def test_help_has_the_names_of_all_recipes_whole(
    columns: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert set(RECIPES) <= {word.strip(",") for word in capsys.readouterr().out.split()}


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
            "model.decoder-block.k (33) must be between 1 and model.decoder-block.num-experts (32)",
        ),
        (["moe-32", "--model.num-expert", "8"], "--model.num-expert: no such option; did you mean"),
        (["moe-32", "--model.k", "33"], "model.k (33) must be between 1 and model.num-experts (32)"),
        (["moe-32", "--model.hidden", "many"], "model.hidden (many)"),
        (["moe-32", "--memory", "much"], "much: give a number, as 80GiB, 450GB or 1e12"),
        (["moe-32", "--memory", "1.2.3"], "1.2.3: give a number"),
        (["moe-32", "--memory", "1e400"], "1e400: give a number"),
        (["translation-moe-32", "--memory-bandwidth", "1T"], "--memory-bandwidth: is for language models"),
        (["moe-32", "--devices", "0"], "devices (0) must be above 0"),
        (["moe-32", "--efficiency", "2"], "efficiency (2.0) must be above 0 and at most 1"),
        (["moe-32", "--dry-run"], "--dry-run: needs --devices and a language model"),
        (["translation-moe-32", "--dry-run", "--devices", "2"], "--dry-run: needs --devices and a language"),
        (["moe-32", "--dry-run", "--devices", "33"], "ranks that share the experts (33) must not exceed"),
        (["small-moe-32", "--devices", "2000"], "devices (2,000) must not exceed the 1,024 tokens"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(words: list[str], message: str, capsys: Capture):
    assert main(["plan", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert message in told.err
