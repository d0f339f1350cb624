"""The benchmarks that train models go from their arguments to a table, and repeat nothing."""

import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import equal_computation, large_model, mixtures, multilingual_models, translation_models
from tests.helpers.runs import make_dataset, make_translation_dataset

SHORT = ["--steps", "3", "--search-steps", "2", "--seeds", "1", "2", "--threads", "1"]
RATES = ["--learning-rates", "1e-3", "1e-2", "--expert-rates", "0.5", "1"]
SMALL = ["--width", "32", "--sentences", "2", "--dropouts", "0"]


def table_of(
    benchmark: ModuleType,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What it prints when it has done everything."""
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    benchmark.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("benchmark", "arguments", "trials"),
    [
        (equal_computation, ["--models", "small-moe-4", "small-moe-1-wide"], 4 + 1 + 2 + 1),
        (mixtures, ["losses", "--recipe", "small-moe-4"], 4),
        pytest.param(
            mixtures,
            ["optimizers", "--recipe", "small-moe-4", "--timed-steps", "2"],
            4 * 4,
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_language_models(
    benchmark: ModuleType,
    arguments: list[str],
    trials: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    data = make_dataset(tmp_path / "text").directory
    told = [*arguments, "--data", str(data), "--out", str(tmp_path / "out"), *SHORT, *RATES]
    first = table_of(benchmark, told, monkeypatch, capsys)
    assert len(re.findall(r"Trial\(", first)) == trials
    again = table_of(benchmark, told, monkeypatch, capsys)
    assert again == first
    (path,) = (path for path in (tmp_path / "out").glob("*.json") if "speeds" not in path.name)
    results = json.loads(path.read_text())
    rows = results["rows"] if isinstance(results, dict) else results
    for row in rows:
        assert [run["seed"] for run in row["runs"]] == [1, 2]
        assert all(math.isfinite(run["test_perplexity"]) for run in row["runs"])
        assert (row["learning_rate"], row["expert_rate"]) in {
            (a, b) for a in (1e-3, 1e-2) for b in (0.5, 1.0)
        }
    assert f"| {rows[-1]['name']} |" in first


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_translation_models(
    many: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data = make_translation_dataset(tmp_path / "text", both_directions=many).directory
    told = ["--data", str(data), "--out", str(tmp_path / "out"), *SHORT, *RATES, *SMALL]
    if not many:
        told += ["--models", "small-translation-dense", "small-translation-moe-32-noisy"]
    benchmark = multilingual_models if many else translation_models
    first = table_of(benchmark, told, monkeypatch, capsys)
    assert len(re.findall(r"Trial\(", first)) == 2 * (4 + 2 + 2 + 2 if many else 2 + 4)
    again = table_of(benchmark, told, monkeypatch, capsys)
    assert again.splitlines()[-1] == first.splitlines()[-1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = (
        results["rows"] if "rows" in results else [r for rs in results["seeds"].values() for r in rs.values()]
    )
    assert {(row["learning_rate"], row["expert_rate"]) for row in rows} <= {
        (a, b) for a in (1e-3, 1e-2) for b in (0.5, 1.0)
    }
    assert all(math.isfinite(pair["perplexity"]) for row in rows for pair in row["pairs"].values())


def test_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A small one: it learns, and what it takes is told beside what is planned."""
    data = make_dataset(tmp_path / "text").directory
    told = ["--model", "moe-4", "--device", "cpu", "--steps", "4", "--batch-words", "64"]
    table_of(large_model, [*told, "--data", str(data), "--out", str(tmp_path)], monkeypatch, capsys)
    found = json.loads((tmp_path / "large_model_cpu.json").read_text())
    assert found["steps"] == len(found["losses"]) == 4
    assert found["losses"][-1] < found["losses"][0]
    assert found["parameters"] > 4 * 2 * 512 * 1024
    weights = 4 * 2 * 512 * 1024 * 2 / 2**30
    assert weights < found["planned (GiB)"] < 1
    assert weights < found["peak (GiB)"] < 2
