import errno
import gzip
import hashlib
import os
import re
import shlex
from pathlib import Path

import pytest

from sparsegate.cli import prepare, progress
from sparsegate.cli.main import main
from sparsegate.data.dataset import Dataset
from tests.data.making import billion_words, write

TEXT = "".join(f"The {number} cats sat on the mat .\nand the dog .\n" for number in range(2000))


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "train.txt", "valid.txt", "test.txt"):
        Path(name).write_text(TEXT + name)
    billion_words(Path("1-billion-word-language-modeling-benchmark-r13output"))


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, and the digest of what is in it."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "line", [line for line in prepare.EXAMPLE.strip().splitlines() if "--pair" not in line]
)
def test_the_examples_work(line: str, capsys: pytest.CaptureFixture[str]):
    words = shlex.split(line)
    assert main(words[1:]) == 0
    dataset = Dataset.open(Path(words[words.index("--output") + 1]))
    assert set(dataset.splits) == {"train", "valid", "test"}
    out = capsys.readouterr().out
    assert all(f"{split.num_tokens:,}" in out for split in dataset.splits.values())
    assert ("recognised as 1 Billion Word benchmark" in " ".join(out.split())) == ("benchmark" in line)


def test_it_is_quiet_where_no_one_watches_and_alike_for_any_number_of_workers(
    capsys: pytest.CaptureFixture[str],
):
    words = ["prepare", "book.txt", "train.txt", "--vocabulary", "words", "--min-count", "2"]
    for workers in ("1", "3"):
        assert main([*words, "--workers", workers, "--output", workers]) == 0
    assert capsys.readouterr().err == ""
    one, three = (
        {path.name: path.read_bytes() for path in Path(workers).iterdir()} for workers in ("1", "3")
    )
    assert one == three
    vocabulary = Dataset.open(Path("1")).vocabulary.to_json()
    assert min(vocabulary["counts"][2:]) >= 2


def test_it_tells_now_and_then_how_far_it_is_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    assert main(["prepare", "book.txt", "--vocabulary", "bytes", "--output", "new"]) == 0
    size = r"[\d.]+ (?:bytes|kB|MB|GB)"
    told = capsys.readouterr().err.splitlines()
    assert told
    assert all(re.fullmatch(rf"reading: {size} of {size}, {size}/s", line) for line in told)


def test_a_list_of_words_is_taken_over_where_it_has_the_size_asked_for(capsys: pytest.CaptureFixture[str]):
    write(Path("words.txt"), "</S> 9\n<S> 8\n<UNK> 7\ncats 6\n")
    words = ["prepare", "book.txt", "--vocabulary-from", "words.txt", "--vocabulary-size"]
    assert main([*words, "4", "--output", "new"]) == 0
    assert Dataset.open(Path("new")).vocabulary.to_json()["words"] == ["</s>", "<unk>", "<S>", "cats"]
    assert main([*words, "793471", "--output", "other"]) == 2
    assert capsys.readouterr().err == (
        "sparsegate prepare: words.txt: has 4 words, special ones included, and not the 793,471 of "
        "--vocabulary-size; leave that out, or give another vocabulary\n"
    )


def test_the_options_reach_the_dataset():
    words = (
        "prepare train.txt --valid valid.txt --output d --vocabulary words --vocabulary-size 10 --tokenized"
    )
    assert main(words.split()) == 0
    dataset = Dataset.open(Path("d"))
    assert (dataset.vocabulary.kind, dataset.vocabulary.size) == ("words", 10)
    assert set(dataset.splits) == {"train", "valid"}
    assert main(["prepare", "--test", "test.txt", "--output", "e", "--vocabulary-from", "d"]) == 0
    assert Dataset.open(Path("e")).vocabulary.to_json() == dataset.vocabulary.to_json()


@pytest.mark.parametrize(
    "words",
    [
        "book.txt --output new --vocabulray bytes",
        "book.txt --output new --vocabulary byte",
        "book.txt --output new --vocabulary-size many",
        "book.txt --output new --vocabulary-size 1",
        "book.txt --output new --vocabulary subwords",
        "book.txt --output new --valid-share 2",
        "book.txt --output new --valid-share nan",
        "book.txt --output new --max-line-bytes 0",
        "book.txt --output new --max-line-bytes 3",
        "book.txt --output new --vocabulary-from nowhere",
        "book.txt --output full",
        "book.txt --output book.txt",
        "book.txt --output book.txt/new",
        "bok.txt --output new",
        "folder --output new",
        "binary.txt --output new",
        "latin.txt --output new",
        "empty.txt --output new",
        "book.txt book.txt --output new",
        "book.txt --output new --workers 0",
        "book.txt --output new --min-count 0",
        "book.txt --output new --vocabulary bytes --min-count 3",
        "book.txt --output new --vocabulary-from binary.txt",
        "shards --output new",
        "mixed --output new",
        "cut.txt.gz --output new",
        "other.jsonl --output new",
        "table.parquet --output new",
        "--output new",
        "book.txt",
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(words: str, capsys: pytest.CaptureFixture[str]):
    Path("folder").mkdir()
    Path("full").mkdir()
    Path("full/precious").write_text("precious")
    Path("binary.txt").write_bytes(bytes(range(256)) * 10)
    Path("latin.txt").write_bytes("na\xefve\n".encode("latin-1"))
    Path("empty.txt").touch()
    write(Path("shards/a-00001-of-00003.txt"), "text")
    write(Path("mixed/a.txt"), "text")
    write(Path("mixed/a.jsonl"), '{"text": "text"}')
    write(Path("cut.txt.gz"), gzip.compress(TEXT.encode())[:-20])
    write(Path("other.jsonl"), '{"body": "text"}')
    write(Path("table.parquet"), "text")
    before = tree(Path())
    assert main(["prepare", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsegate prepare: ")
    assert err.count("\n") == 1
    assert tree(Path()) == before


def test_a_full_disk_is_no_fault_of_the_input_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = tree(Path())
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["prepare", "book.txt", "--output", "new"]) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert tree(Path()) == before
