import errno
import hashlib
import os
import shlex
from pathlib import Path

import pytest

from sparsegate.cli import prepare
from sparsegate.cli.main import main
from sparsegate.data.dataset import Dataset

TEXT = "".join(f"The {number} cats sat on the mat .\nand the dog .\n" for number in range(2000))


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "train.txt", "valid.txt", "test.txt"):
        Path(name).write_text(TEXT + name)


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
