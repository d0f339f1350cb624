"""`sparsegate search`."""

import json
from pathlib import Path

import pytest

from sparsegate.cli import search as module
from sparsegate.cli.main import main
from tests.helpers.runs import make_dataset

Capture = pytest.CaptureFixture[str]
TINY = (
    "--model.width 8 --model.lstm-units 8 --model.hidden 8 --model.num-experts 4 --model.k 2 "
    "--training.steps 3 --batches.batch-size 2 --batches.num-steps 8 --optim.warmup-steps 1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("text") / "text").directory


def words(data: Path, out: Path, *more: str) -> list[str]:
    return ["search", "small-moe-4", "--data", str(data), "--out", str(out), *TINY.split(), *more]


def test_the_table_has_the_best_first(data: Path, tmp_path: Path, capsys: Capture):
    more = [
        "--learning-rates",
        "1e-4",
        "1e-1",
        "1e30",
        "--expert-rates",
        "0.5",
        "1",
        "--dropouts",
        "0",
        "0.1",
    ]
    assert main(words(data, tmp_path / "out", *more)) == 0
    shown = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in shown.out.splitlines() if "│" in line]
    saved = json.loads((tmp_path / "out" / "search.json").read_text())
    assert rows == [[f"{t[name]:g}" for name in ("learning_rate", "expert_rate", "dropout")] for t in saved]
    assert len(rows) == 12
    ranked = [trial["folder"] for trial in saved]
    assert ranked[0].startswith("lr-0.1-")
    assert shown.out.endswith(f"the best run: {tmp_path / 'out' / ranked[0]}\n")
    assert all(name.startswith("lr-1e+30-") for name in ranked[-4:])
    assert shown.out.count("diverged") == 4
    assert "Traceback" not in shown.err


def test_dropout_is_the_recipes_where_none_is_given(data: Path, tmp_path: Path):
    assert main(words(data, tmp_path / "out", "--learning-rates", "1e-3", "--model.dropout", "0.3")) == 0
    assert [entry.name for entry in (tmp_path / "out").glob("lr-*")] == ["lr-0.001-experts-1-dropout-0.3"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--learning-rates", "1e-3", "--optim.lerning-rate", "1"), "did you mean --optim.learning-rate?"),
        (("--learning-rates", "1e-3", "-1"), "optim.learning-rate (-1.0) must be above 0"),
        (("--learning-rates", "1e-3", "--dropouts", "0", "1"), "model.dropout (1.0) must be at least 0"),
        (("--learning-rates", "fast"), "fast"),
        ((), "--learning-rates"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_is_made(
    more: tuple[str, ...], message: str, data: Path, tmp_path: Path, capsys: Capture
):
    assert main(words(data, tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert not (tmp_path / "out").exists()


def test_a_search_without_a_dataset_says_where_one_comes_from(tmp_path: Path, capsys: Capture):
    assert main(["search", "small-moe-4", "--out", str(tmp_path / "o"), "--learning-rates", "1e-3"]) == 2
    assert "--data: give the dataset" in capsys.readouterr().err


def test_a_signal_ends_it_with_0_and_the_way_on(
    data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    def stopped(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "search", stopped)
    assert main(words(data, tmp_path / "out", "--learning-rates", "1e-3")) == 0
    assert capsys.readouterr().err == "stopped, and saved; the same command goes on\n"
