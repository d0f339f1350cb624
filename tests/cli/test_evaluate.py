import json
import shlex
from pathlib import Path

import pytest

from sparsegate import load
from sparsegate.cli import evaluate
from sparsegate.cli.main import main
from sparsegate.data import Dataset
from sparsegate.models.gates import ExpertChoiceGate
from tests.helpers.runs import make_run


@pytest.fixture(autouse=True)
def in_folder(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(book)


@pytest.mark.parametrize("line", evaluate.EXAMPLE.strip().splitlines())
def test_the_examples_work(line: str, capsys: pytest.CaptureFixture[str]):
    assert main(shlex.split(line)[1:]) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""


@pytest.mark.parametrize("part", ["all", "first-half"])
def test_json_has_the_numbers_of_the_library(part: str, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "runs/book", "--split", "valid", "--part", part, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = load("runs/book").evaluate("valid", part=part)
    assert found.items() >= expected.metrics().items()
    assert (found["step"], found["split"], found["part"]) == (10, "valid", part)
    assert (found["tokens"], found["words"]) == (expected.num_tokens, expected.num_words)
    assert found["bytes"] == expected.num_bytes
    assert found["balance"]["moe"].keys() >= {"cv_importance", "cv_load", "dead_experts"}


def test_the_table_shows_them(capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "runs/book", "--checkpoint", "last"]) == 0
    out = capsys.readouterr().out
    expected = load("runs/book", checkpoint="last").evaluate()
    assert "step 20" in out
    for value in (expected.perplexity, expected.word_perplexity):
        assert f"{value:.3f}" in out
    assert f"{expected.bits_per_byte:.4f}" in out


@pytest.mark.parametrize(
    "words",
    [
        "nowhere",
        "datasets/other",
        "",
        "runs/book --split tset",
        "runs/book --part third-half",
        "runs/book --data nowhere",
        "runs/book --data runs/book",
        "runs/book --data bytes/dataset",
        "runs/book --checkpoint bets",
        "runs/book --checkpoint 15",
        "runs/book --batch-size 0",
        "runs/book --batch-size many",
        "runs/book --device cuda:7",
        "runs/book --spilt test",
    ],
)
def test_bad_input_is_refused_in_one_line(words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsegate evaluate: ")
    assert err.count("\n") == 1


def test_a_model_that_sees_the_future_is_named(book: Path, capsys: pytest.CaptureFixture[str]):
    dataset = Dataset.open(book / "text/dataset")
    make_run(book / "runs/choice", dataset, gate=ExpertChoiceGate())
    assert main(["evaluate", "runs/choice", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sees_later_tokens"] is True
    assert err.startswith("warning: runs/choice: its gate chooses among tokens")
    assert err.count("\n") == 1
    assert main(["evaluate", "runs/book", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sees_later_tokens"] is False
    assert err == ""
