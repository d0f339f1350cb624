"""`sparsegate study`: from one command to results and figures; what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch

from sparsegate.cli.main import main
from sparsegate.training import memory
from tests.helpers.runs import make_dataset

Capture = pytest.CaptureFixture[str]
MODELS = ["small-4xlstm", "small-moe-4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("text") / "text").directory


def words(data: Path, out: Path, *more: str) -> list[str]:
    small = [
        "--batch-words",
        "64",
        "--learning-rates",
        "1e-2",
        "--expert-rates",
        "1",
        "--words",
        "100",
        "200",
        "--models",
    ]
    return ["study", "--data", str(data), "--out", str(out), *small, *MODELS, *more]


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "small"
    assert main(words(data, out, "--other-costs", "small-lstm")) == 0
    return out


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_has_results_and_figures(done: Path, capsys: Capture):
    rows = json.loads((done / "results.json").read_text())
    assert {(row["model"], row["budget"]) for row in rows} == {
        (model, budget) for model in [*MODELS, "small-lstm"] for budget in (100, 200)
    }
    assert [row["model"] for row in rows if not row["equal_cost"]] == ["small-lstm"] * 2
    assert all(row["low"] < row["perplexity"] < row["high"] for row in rows)
    markdown = (done / "results.md").read_text()
    for row in rows:
        assert f"| {row['model']} |" in markdown
        assert f"{row['perplexity']:.2f}" in markdown
    for name in ("figure2", "figure3"):
        assert (done / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (done / f"{name}.svg").read_text()
    assert "moe-4" in (done / "figure2.svg").read_text()


def test_the_folder_says_how_it_came_about(done: Path, data: Path):
    told = json.loads((done / "study.json").read_text())
    assert told["study"]["models"] == MODELS
    assert told["study"]["data"] == str(data)
    assert {"command", "commit", "torch", "processor"} <= told["commands"][0].keys()
    assert told["version"]


def test_a_report_is_made_of_what_is_there(done: Path, capsys: Capture):
    before = contents(done)
    for name in ("results.json", "results.md", "figure2.svg"):
        (done / name).unlink()
    assert main(["study", "--out", str(done), "--report"]) == 0
    after = contents(done)
    assert before.keys() == after.keys()
    for name in ("results.json", "results.md", "figure2.svg"):
        assert after[done / name] == before[done / name]
    assert "| small-moe-4 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-words", "128"], "--batch-words (128) is 64 in"),
        (["--learning-rates", "1e-2", "2e-2"], "learning-rates (0.01 0.02) is 0.01 in"),
        (["--gates", "on-top"], "gates (on-top) is within in"),
        (["--dropout", "0.5"], "dropout (0.5) is 0.0 in"),
        (["--expert-rates", "0.5"], "expert-rates (0.5) is 1.0 in"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_lost(
    done: Path, data: Path, more: list[str], message: str, capsys: Capture
):
    before = contents(done)
    assert main(words(data, done, *more)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert "give the same, or another --out" in told
    assert contents(done) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0.9"}, "made by version 0.0.9 of sparsegate"),
        ({"format": 7}, "made by format 7 of sparsegate"),
        ({"study": {}}, "study.json: "),
        ({"commands": None}, "does not tell of a study"),
    ],
)
@pytest.mark.parametrize("report", [False, True])
def test_a_study_of_another_version_is_refused_and_nothing_is_lost(
    data: Path, tmp_path: Path, done: Path, change: dict, message: str, report: bool, capsys: Capture
):
    (tmp_path / "old").mkdir()
    path = tmp_path / "old" / "study.json"
    path.write_text(json.dumps(json.loads((done / "study.json").read_text()) | change))
    before = contents(tmp_path)
    command = ["study", "--out", str(tmp_path / "old"), "--report"] if report else None
    assert main(command or words(data, tmp_path / "old")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--models", "small-moe-33"], "small-moe-33: no such recipe; did you mean small-moe-32?"),
        (["--models", "small-lstm"], "models (small-lstm): does 589,824 multiply-adds for each word"),
        (["--words", "200", "100"], "words (200 100) must be ascending"),
        (["--words", "0"], "words (0) must be above 0"),
        (["--seeds", "1", "1"], "seeds (1 1) must be given once each"),
        (["--seeds", "-1"], "seeds (-1) must be at least 0"),
        (["--learning-rates", "-1"], "learning-rates (-1.0) must be above 0"),
        (["--dropout", "1"], "model.dropout (1.0) must be at least 0 and below 1"),
        (["--search-words", "0"], "search-words (0) must be above 0"),
        (["--batch-words", "8"], "batches.batch-words (8) must be at least batches.max-length (64)"),
        (["--other-costs", "small-moe-4"], "other-costs (small-moe-4) must be other models than those"),
        (["--scale", "cluster"], "cluster"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path, more: list[str], message: str, capsys: Capture
):
    assert main(words(data, tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_here_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more, message in (
        ([], "models (small-4xlstm), scale (laptop): model: training it takes about "),
        (
            ["--scale", "gpu", "--models", "moe-4"],
            "scale (gpu): training.device (cuda): this torch sees no GPU",
        ),
    ):
        assert main(words(data, tmp_path / "out", *more)) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert message in told
        assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(data: Path, tmp_path: Path, capsys: Capture):
    (tmp_path / "letter.txt").write_text("Dear")
    assert main(words(data, tmp_path)) == 2
    assert "not empty and not a study; give another --out" in capsys.readouterr().err
    assert main(["study", "--out", str(tmp_path), "--report"]) == 2
    assert "not a study: it has no study.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_study_without_a_dataset_says_where_one_comes_from(tmp_path: Path, capsys: Capture):
    assert main(["study", "--out", str(tmp_path / "out")]) == 2
    assert "--data: give the dataset" in capsys.readouterr().err
