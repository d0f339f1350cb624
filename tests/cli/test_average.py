import shlex
from pathlib import Path

import pytest

from sparsegate.cli import average
from sparsegate.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("line", average.EXAMPLE.strip().splitlines())
def test_the_examples_work(line: str, book: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    monkeypatch.chdir(book)
    assert main(shlex.split(line)[1:]) == 0
    assert "the mean of the weights at step 10, 20" in capsys.readouterr().out


def test_every_verb_takes_what_is_made(book: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    monkeypatch.chdir(book)
    for run in ("book", "en-fr"):
        assert main(["average", f"runs/{run}"]) == 0
    assert main(["evaluate", "runs/book-average", "--json"]) == 0
    assert main(["generate", "runs/book-average", "--prompt", "The", "--max-tokens", "3"]) == 0
    assert main(["evaluate", "runs/en-fr-average", "--greedy", "--sentences", "2", "--json"]) == 0
    assert main(["average", "runs/book"]) == 2
    assert "runs/book-average: exists already" in capsys.readouterr().err


def test_of_one_checkpoint_there_is_no_mean(book: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    monkeypatch.chdir(book)
    assert main(["average", "runs/book", "--last", "1", "--out", "runs/book-alone"]) == 0
    capsys.readouterr()
    assert main(["average", "runs/book-alone"]) == 2
    assert "runs/book-alone: has one checkpoint alone, of step 20" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["nowhere", "runs/book --last 3", "runs/book --steps 15", "datasets/other"])
def test_bad_input_is_refused_in_one_line(
    words: str, book: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.chdir(book)
    assert main(["average", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsegate average: ")
    assert err.count("\n") == 1
