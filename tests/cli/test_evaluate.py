import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsegate import load
from sparsegate.cli import evaluate, evaluate_translation, progress
from sparsegate.cli.main import main
from sparsegate.data import Dataset
from sparsegate.models.gates import ExpertChoiceGate
from sparsegate.recipes.translation_run import TranslationRun
from tests.helpers.runs import make_run, make_translation_dataset


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


def translated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["evaluate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_sacrebleu_says_the_same_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its own command line, on what stands in the folder."""
    found = translated(
        capsys, "runs/en-fr", "--resamples", "100", "--beam", "2", "--out", str(tmp_path / "o")
    )
    files = [str(tmp_path / "o" / f"en-fr.{name}.txt") for name in ("references", "hypotheses")]
    command = [sys.executable, "-m", "sacrebleu", files[0], "-i", files[1], "-m", "bleu", "chrf", "-w", "6"]
    program = subprocess.run(
        [*command, "--confidence", "--confidence-n", "100"], capture_output=True, text=True
    )
    if program.returncode:  # it fails where a resampled score is 0
        program = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(program.stdout)
    ours = found["pairs"]["en-fr"]["scores"]
    assert [each["name"] for each in ours] == [each["name"] for each in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["value"] == pytest.approx(other["score"], abs=1e-5)
    assert json.loads((tmp_path / "o" / "scores.json").read_text()) == found
    assert len(Path(files[1]).read_text().splitlines()) == found["pairs"]["en-fr"]["translated"] == 12


def test_translations_stand_in_the_folder_of_the_run(capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "runs/many", "--split", "valid", "--greedy", "--sentences", "3"]) == 0
    out = capsys.readouterr().out
    assert "en-fr" in out
    assert "fr-en" in out
    folder = Path("runs/many/translations/valid-step-10-first-3-greedy")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert sorted(file.name for file in folder.iterdir()) == [
        *(f"{pair}.{what}.txt" for pair in ("en-fr", "fr-en") for what in ("hypotheses", "references")),
        "scores.json",
    ]
    assert main(["evaluate", "runs/many", "--pair", "fr-en", "--greedy", "--sentences", "3", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["pairs"]) == ["fr-en"]
    others = ["--split", "valid", "--greedy", "--sentences", "2", "--pair", "fr-en", "--json"]
    assert main(["evaluate", "runs/many", *others]) == 0
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_where_nothing_can_be_written_shows_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(TranslationRun, "evaluate", None)
    assert main(["evaluate", "runs/en-fr", "--greedy", "--out", str(tmp_path / "file")]) == 2
    assert "file: File exists" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_refused_leaves_no_empty_folder_and_takes_none_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine").mkdir()
    for out in ("mine", "new"):
        words = ["--pair", "en-de", "--greedy", "--out", str(tmp_path / out)]
        assert main(["evaluate", "runs/en-fr", *words]) == 2
        assert "has no pair 'en-de'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert main(["evaluate", "runs/dense", "--pair", "en-de"]) == 2
    assert not Path("runs/dense/translations").exists()


@pytest.mark.parametrize("run", ["runs/book", "runs/dense --greedy --sentences 2"])
def test_a_long_evaluation_tells_how_far_it_is_where_there_is_no_terminal(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    out = ["--out", str(tmp_path)] * ("greedy" in run)
    assert main(["evaluate", *run.split(), *out, "--json"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"evaluating: ([\d,]+) of \1", told[-1])


def test_a_run_is_compared_with_another_and_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = ["--greedy", "--resamples", "50"]
    translated(capsys, "runs/dense", *plain, "--out", str(tmp_path / "dense"))
    with_run = translated(capsys, "runs/en-fr", *plain, "--against", "runs/dense")
    file = tmp_path / "dense" / "en-fr.hypotheses.txt"
    with_file = translated(capsys, "runs/en-fr", *plain, "--against", str(file))
    compared = with_run["pairs"]["en-fr"]["compared"]
    assert compared == with_file["pairs"]["en-fr"]["compared"]
    assert [each["name"] for each in compared] == ["BLEU", "chrF2"]
    chrf = with_run["pairs"]["en-fr"]["scores"][1]["value"]
    assert compared[1]["system"] == pytest.approx(chrf)
    assert 0 < compared[1]["p_value"] <= 1


def test_a_baseline_that_does_not_fit_is_refused_before_anything_is_translated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "three.txt"
    file.write_bytes(b"one\ntwo\rtwo\nthree\n")  # a carriage return ends no line
    message = f"{file}: has 3 lines, but 12 sentences are translated"
    monkeypatch.setattr(TranslationRun, "evaluate", None)
    for against, wrong in ((str(file), message), ("nowhere", "nowhere: No such file")):
        assert main(["evaluate", "runs/en-fr", "--against", against]) == 2
        assert wrong in capsys.readouterr().err


def test_translations_are_kept_when_the_comparison_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fails(*args: object, **keywords: object) -> None:
        raise ValueError("cannot be compared")

    monkeypatch.setattr(evaluate_translation, "compare", fails)
    out = tmp_path / "kept"
    words = ["--greedy", "--sentences", "3", "--against", "runs/dense", "--out", str(out)]
    assert main(["evaluate", "runs/en-fr", *words]) == 2
    assert "cannot be compared" in capsys.readouterr().err
    assert len((out / "en-fr.hypotheses.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs/en-fr --part first-half", "--part: is for language models"),
        ("runs/en-fr --pair en-de", "test has no pair 'en-de', but en-fr"),
        ("runs/en-fr --sentences 0", "--sentences (0) must be at least 1"),
        ("runs/en-fr --resamples -1", "--resamples (-1) must not be negative"),
        ("runs/en-fr --against nowhere", "nowhere: No such file"),
        ("runs/en-fr --against runs/book", "runs/book: is the run of a language model"),
        ("runs/en-fr --data datasets/other", "not a translation dataset"),
        ("runs/en-fr --data elsewhere/dataset", "made with other subwords"),
        ("runs/many --against pairs/en-fr.tsv", "is one file for 2 pairs; choose one by --pair"),
        ("runs/book --beam 3", "--beam: is for translation models; leave it out"),
        ("runs/book --temperature 0", "--temperature: is for translation models"),
        ("runs/book --top-k 2", "--top-k: is for translation models"),
        ("runs/book --resamples 0", "--resamples: is for translation models"),
        ("runs/book --against runs/en-fr", "--against: is for translation models"),
    ],
)
def test_what_does_not_fit_the_kind_of_model_is_refused(
    words: str, message: str, book: Path, capsys: pytest.CaptureFixture[str]
):
    if not (book / "elsewhere").exists():
        make_translation_dataset(book / "elsewhere", lines=["other words stand here"] * 20)
    given = [] if "runs/book" in words.split()[:1] else ["--greedy"]
    assert main(["evaluate", *words.split(), *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
