"""`sparsegate bench`."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from sparsegate.benchmarking import sweep
from sparsegate.cli.main import main

Capture = pytest.CaptureFixture[str]

TINY = ["--width=8", "--hidden=16", "--k=2", "--repeats=1", "--threads=1", "--no-peers", "--no-memory"]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "measure_bandwidth", lambda size: MEASURE(1 << 20))


MEASURE = sweep.measure_bandwidth


@pytest.mark.parametrize(
    ("words", "heading"),
    [
        ("layer --experts 2 4 --tokens 6", "| experts | computes | 2 | 4 |"),
        ("tokens --experts 4 --tokens 6 12 --dtype bfloat16", "| tokens | computes | 6 | 12 |"),
    ],
)
def test_tables_are_printed_and_files_written(words: str, heading: str, tmp_path: Path, capsys: Capture):
    name = words.split()[0]
    out = tmp_path / "new/folder"
    assert main(["bench", *words.split(), *TINY, "--out", str(out), "--plot"]) == 0
    told = capsys.readouterr()
    assert heading in told.out
    assert "checking" in told.err
    assert sorted(file.name for file in out.iterdir()) == [f"{name}.{end}" for end in ("json", "png", "svg")]
    stored = json.loads((out / f"{name}.json").read_text())
    assert stored["sweep"] == name
    assert stored["torch"] == torch.__version__


def test_json_is_one_object_with_its_circumstances(capsys: Capture):
    assert main(["bench", "layer", "--experts", "2", "--tokens", "6", *TINY, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["threads"] == 1
    assert {row["name"] for row in results["rows"]} >= {"dense", "sparsegate experts", "sparsegate layer"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("layers", "argument sweep: invalid choice: 'layers'"),
        ("layer --dtype float8", "argument --dtype: invalid choice: 'float8'"),
        ("layer --experts 3", "--experts (3) must be at least --k (4)"),
        ("layer --experts 1 --k 1", "--experts (1) must be at least 2, so that"),
        ("layer --tokens 0", "--tokens (0) must be at least 1"),
        ("layer --tokens 8 16", "--tokens (8 16) must be one number in the sweep layer"),
        ("tokens --experts 8 16", "--experts (8 16) must be one number in the sweep tokens"),
        ("small-batch --repeats 0", "--repeats (0) must be at least 1"),
        ("layer --threads 0", "--threads (0) must be at least 1"),
        ("layer --experts 9999999", "--experts (9,999,999) with --tokens (4,096) need 8"),
        ("layer --plot", "--plot: needs a folder to write to; add --out DIR"),
        ("layer --davidmrau none.py", "none.py: No such file or directory"),
        ("layer --out file", "file: File exists"),
        ("layer --out file/folder", "file/folder: Not a directory"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["bench", *words.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"sparsegate bench: {line}")
    assert told.err.count("\n") == 1


def test_a_folder_that_takes_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["bench", "layer", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"sparsegate bench: {tmp_path}: Permission denied\n"


def test_a_picture_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "sparsegate.benchmarking.plot", raising=False)
    assert main(["bench", "layer", "--out", str(tmp_path), "--plot"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "plot: matplotlib is not installed; pip install 'sparsegate[plots]', or leave --plot out" in err
