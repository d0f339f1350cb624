import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegate import load
from sparsegate.cli import score, trained
from sparsegate.cli.main import main

Put = Callable[[bytes], None]
LINES = ["The 5 cats sat .", "", "a dög", "xyz 123"]


@pytest.fixture(autouse=True)
def in_folder(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(book)


def test_each_line_has_its_total_and_its_tokens(standard_input: Put, capsys: pytest.CaptureFixture[str]):
    standard_input("\n".join(LINES).encode())
    assert main(["score", "runs/book"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    expected = list(load("runs/book").score(LINES))
    assert [text for _, _, text in rows] == LINES
    assert [int(number) for _, number, _ in rows] == [len(scored.tokens) for scored in expected]
    assert [float(total) for total, _, _ in rows] == pytest.approx([s.total for s in expected], abs=1e-4)


def test_per_token_there_is_an_object_for_each_line(standard_input: Put, capsys: pytest.CaptureFixture[str]):
    standard_input("\n".join(LINES).encode() + b"\n")
    assert main(["score", "runs/book", "--per-token"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == LINES
    for row in rows:
        assert load("runs/book").vocabulary.decode(row["ids"]) == row["text"] + "\n"
        assert row["tokens"][-1] == "\n"
        assert len(row["tokens"]) == len(row["ids"]) == len(row["logprobs"])
        assert sum(row["logprobs"]) == pytest.approx(row["total"])
        assert row["num_unknown"] == 0


def test_lines_may_be_cut_anywhere_by_what_is_read_at_once(
    standard_input: Put, monkeypatch: pytest.MonkeyPatch
):
    text = "\N{BYTE ORDER MARK}erste Zeile\r\n\nGrüße\n\u2028 bleibt\nletzte"
    for read_bytes in (1, 2, 3, 1000):
        monkeypatch.setattr(trained, "_READ_BYTES", read_bytes)
        standard_input(text.encode())
        lines = [line for batch in trained.lines_as_they_come() for line in batch]
        assert lines == ["erste Zeile", "", "Grüße", "\u2028 bleibt", "letzte"]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (b"caf\xe9", "line 3: byte 0xe9 is not UTF-8"),
        (b"a\0b", "line 3: a NUL byte"),
        (b"\xed\xa0\x80", "line 3: byte 0xed is not UTF-8"),
        (b"x" * 5000, "line 3: longer than 4,096 bytes"),
        (b"x" * 5000 + b"\n", "line 3: longer than 4,096 bytes"),
    ],
)
def test_a_bad_line_is_named_after_those_before_it_were_scored(
    bad: bytes,
    complaint: str,
    standard_input: Put,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(trained, "_MAX_LINE_BYTES", 4096)
    standard_input(b"good\nalso good\n" + bad)
    assert main(["score", "runs/book"]) == 2
    out, err = capsys.readouterr()
    assert [line.split("\t")[2] for line in out.splitlines()] == ["good", "also good"]
    assert err.startswith(f"sparsegate score: standard input, {complaint}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["nowhere", "runs/book --checkpoint 15", "runs/book extra", "runs/book --per-tokn"]
)
def test_bad_input_is_refused_in_one_line(
    words: str, capsys: pytest.CaptureFixture[str], standard_input: Put
):
    standard_input(b"text")
    assert main(["score", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_a_closed_standard_input_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["score", "runs/book"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_examples_work(standard_input: Put, capsys: pytest.CaptureFixture[str]):
    first, second = score.EXAMPLE.strip().splitlines()
    for words in (first.split("|")[1], second.split("<")[0]):
        standard_input(b"The cat sat on the mat.\n")
        assert main(words.split()[1:]) == 0
        assert "The cat sat on the mat." in capsys.readouterr().out


def test_a_line_is_answered_before_the_next_is_written_and_a_reader_may_leave(book: Path):
    command = [sys.executable, "-m", "sparsegate", "score", "runs/book"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=book, **pipes) as process:
        for line in (b"The 5 cats\n", b"\n", b"mats\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\t" + line)
        process.stdout.close()
        process.stdin.write(b"nobody reads this\n" * 10)
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
