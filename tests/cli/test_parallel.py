"""`sparsegate prepare` of parallel text."""

import shlex
from pathlib import Path

import pytest

from sparsegate.cli import prepare
from sparsegate.cli.main import main
from sparsegate.data.parallel import TranslationDataset
from tests.data.parallel.making import pairs, tsv


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several = pairs("en", "fr", range(300))
    for place, language in enumerate(("en", "fr")):
        Path(f"train.{language}").write_text("".join(f"{pair[place]}\n" for pair in several))
    Path("short.fr").write_text("un\n")
    Path("latin.tsv").write_bytes("one\tna\xefve\n".encode("latin-1"))
    tsv(Path("valid.tsv"), pairs("en", "fr", range(300, 340)))
    tsv(Path("test.tsv"), pairs("en", "fr", range(340, 380)))
    tsv(Path("de.tsv"), [*pairs("en", "de", range(200)), ("", "leer"), ("one", "eins " * 300)])
    Path("book.txt").write_text("a line\n" * 900)


def test_the_example_works(capsys: pytest.CaptureFixture[str]):
    (line,) = [line for line in prepare.EXAMPLE.splitlines() if "--pair" in line]
    words = shlex.split(line)
    assert main(words[1:]) == 0
    dataset = TranslationDataset.open(Path(words[words.index("--output") + 1]))
    dataset.verify()
    assert {name: list(part) for name, part in dataset.parts.items()} == {
        "train": ["en-fr"],
        "valid": ["en-fr"],
    }
    out = capsys.readouterr().out
    assert all(f"{part['en-fr'].source.num_tokens:,}" in out for part in dataset.parts.values())


def test_the_options_reach_the_dataset(capsys: pytest.CaptureFixture[str]):
    words = """prepare --pair en-fr:train.en,train.fr --pair en-de:de.tsv --valid-pair en-fr:valid.tsv
    --test-pair en-fr:test.tsv --both-directions --max-subwords 50 --max-ratio 5 --vocabulary-size 300
    --output d"""
    assert main(words.split()) == 0
    dataset = TranslationDataset.open(Path("d"))
    assert dataset.vocabulary.size == 300
    assert dataset.manifest.parts["train"]["en-de"].left_out == {"empty": 1, "too_long": 1, "ratio": 0}
    assert list(dataset.part("train")) == ["en-fr", "fr-en", "en-de", "de-en"]
    assert dataset.manifest.filters.max_ratio == 5
    out = capsys.readouterr().out
    assert "both directions" in out
    assert "train, en-de: left out 1 empty, 1 too long\n" in out
    assert "…" not in out
    taken = "prepare --test-pair fr-en:valid.tsv@2,1 --vocabulary-from d --output e"
    assert main(taken.split()) == 0
    pair = TranslationDataset.open(Path("e")).pair("test", "fr-en")
    assert pair.source_language == "fr"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("--pair en-fr:train.en,short.fr", "train.en has 300 lines and short.fr 1, but they must be "),
        ("--pair en-fr:latin.tsv", "latin.tsv, line 1: byte 0xef is not UTF-8"),
        ("--pair en-fr:absent.tsv", "absent.tsv: no such file or directory"),
        ("--pair train.en", "'train.en': must be languages and files, such as en-fr:"),
        ("--pair en-fr:valid.tsv --max-ratio 0", "--max-ratio (0.0) must be at least 1"),
        ("--pair en-fr:valid.tsv --vocabulary-size 9", "--vocabulary-size (9) must be at least 262"),
        ("--pair en-fr:valid.tsv --vocabulary words", "--vocabulary: is for text of one language"),
        ("--pair en-fr:valid.tsv --workers 2", "--workers: is for text of one language"),
        ("--pair en-fr:valid.tsv --hold-out files", "--hold-out: is for text of one language"),
        ("book.txt --pair en-fr:valid.tsv", "TEXT: is for text of one language"),
        ("--pair en-fr:valid.tsv --valid book.txt", "--valid: is for text of one language"),
        ("--pair en-fr:valid.tsv --test-pair en-fr:valid.tsv", "valid.tsv: given twice, for train (en-fr)"),
        ("book.txt --both-directions", "--both-directions: is for parallel text; give a --pair"),
        ("book.txt --max-subwords 9", "--max-subwords: is for parallel text"),
        ("--valid-pair en-fr:valid.tsv", "train: no text to make subwords from"),
        ("--pair en-fr:valid.tsv --pairs en-fr:valid.tsv", "--pairs: no such option; did you mean --pair"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(
    words: str, cause: str, capsys: pytest.CaptureFixture[str]
):
    before = sorted(Path().iterdir())
    assert main(["prepare", *words.split(), "--output", "new"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sparsegate prepare: {cause}")
    assert err.count("\n") == 1
    assert sorted(Path().iterdir()) == before
