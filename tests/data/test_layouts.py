"""Folders of known corpora, whole and with files missing."""

import gzip
import json
from pathlib import Path

import pytest

from sparsegate.data import prepare
from sparsegate.data.layouts import layout_of
from sparsegate.data.text_files import text_files
from tests.data.making import HELD_OUT, TRAINING, billion_words, write


def wikitext(folder: Path, ending: str = "tokens") -> Path:
    for split in ("train", "valid", "test"):
        write(folder / f"wiki.{split}.{ending}", f" \n = {split} = \n \n a <unk> @-@ word . \n")
    return folder


def c4(folder: Path) -> Path:
    for split, count in (("train", 3), ("validation", 2)):
        for number in range(count):
            document = json.dumps({"text": f"{split} {number}\nmore", "url": "..."}).encode()
            write(folder / f"c4-{split}.{number:05}-of-{count:05}.json.gz", gzip.compress(document, mtime=0))
    return folder


def prepared(folder: Path, **options: object) -> dict[str, list[str]]:
    options = {"train": [folder / "corpus"], "vocabulary": "words"} | options
    dataset = prepare(output=folder / "dataset", **options)
    dataset.verify()
    return {
        name: dataset.vocabulary.decode(split.token_N[:-1]).split("\n")
        for name, split in dataset.splits.items()
    } | {"layout": [str(dataset.manifest.layout), dataset.manifest.normalization]}


def test_the_billion_word_benchmark_brings_its_splits(tmp_path: Path) -> None:
    billion_words(tmp_path / "corpus")
    assert prepared(tmp_path) == {
        "train": [f"train {number} ." for number in range(1, 100)],
        "valid": ["<unk> <unk> 1 ."],
        "test": ["<unk> <unk> <unk> ."],
        "layout": ["1 Billion Word benchmark", "tokenized-1"],
    }


@pytest.mark.parametrize("ending", ["tokens", "raw"])
def test_wikitext_brings_its_splits_and_its_blank_lines(ending: str, tmp_path: Path) -> None:
    wikitext(tmp_path / "corpus", ending)
    text = ["", "= train =", "", "a <unk> @-@ word ."]
    held_out = ["", "= <unk> =", "", "a <unk> @-@ word ."]
    assert prepared(tmp_path) == {
        "train": text,
        "valid": held_out,
        "test": held_out,
        "layout": ["WikiText", "tokenized-1"],
    }


def test_shards_bring_the_splits_that_they_name(tmp_path: Path) -> None:
    c4(tmp_path / "corpus")
    assert prepared(tmp_path, vocabulary="bytes") == {
        "train": ["train 0", "more", "train 1", "more", "train 2", "more"],
        "valid": ["validation 0", "more", "validation 1", "more"],
        "layout": ["shards that name their split", "plain-1"],
    }


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl.gz", "txt.gz"])
@pytest.mark.parametrize("name", ["train-{}-{}", "c4-train.{}", "en_train-{}"])
def test_shards_of_any_common_name_and_ending_bring_their_splits(
    name: str, ending: str, tmp_path: Path
) -> None:
    """In older data sets on hubs each has a hash in its name, and another one."""
    texts = {"train": ["one", "two"], "dev": ["three"], "test": ["four"]}
    for split, lines in texts.items():
        for number, line in enumerate(lines):
            content = (json.dumps({"text": line}) if "json" in ending else line).encode()
            hashed = f"{ord(line[0]):016x}"
            stem = name.replace("train", split).format(f"{number:05}-of-{len(lines):05}", hashed)
            packed = gzip.compress(content) if ending.endswith("gz") else content
            write(tmp_path / f"corpus/{stem}.{ending}", packed)
    assert prepared(tmp_path, vocabulary="bytes") == {
        "train": ["one", "two"],
        "valid": ["three"],
        "test": ["four"],
        "layout": ["shards that name their split", "plain-1"],
    }


@pytest.mark.parametrize(
    "odd",
    [
        "unsupervised-00000-of-00001.txt",
        "train-00000-of-00001.txt.md5",
        "train-00000-of-00002-0123456789abcdef-more.txt",
        "notes.txt",
        "more/extra.txt",
    ],
)
def test_a_folder_that_is_no_layout_because_of_one_file_is_refused_by_its_name(
    odd: str, tmp_path: Path
) -> None:
    for name in ("train-00000-of-00001.txt", "test-00000-of-00001.txt", odd):
        write(tmp_path / "corpus" / name, "text\n")
    assert refusal(tmp_path) == (
        f"/{odd}: does not fit among shards of test and train; "
        "give the files of each split by name, or a folder with nothing else"
    )


def test_shards_of_several_splits_below_a_folder_are_no_text_to_train_on(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.txt", "validation-00000-of-00001.txt"):
        write(tmp_path / "corpus/data" / name, "text\n")
    assert "does not fit among shards of train and valid; give the files of each" in refusal(tmp_path)
    assert len(text_files([write(tmp_path / "only/test-00000-of-00001.txt", "text").parent])) == 1


def test_splits_of_different_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "corpus/train-00000-of-00001.jsonl", '{"text": "line"}')
    write(tmp_path / "corpus/test-00000-of-00001.txt", "line")
    found = "JSON lines (train-00000-of-00001.jsonl) and plain text (test-00000-of-00001.txt)"
    assert refusal(tmp_path) == f": mixes {found}; give the files that are the text by name"


def test_checksums_of_shards_are_not_text(tmp_path: Path) -> None:
    write(c4(tmp_path / "corpus") / "c4-train.00000-of-00003.json.gz.md5", "d41d8cd9  c4-train\n")
    assert ": mixes JSON lines (c4-train.00000-of-00003.json.gz) and plain text (c4-" in refusal(tmp_path)


def test_a_shard_that_is_there_twice_is_named(tmp_path: Path) -> None:
    for digit in "ab":
        write(tmp_path / f"corpus/train-00000-of-00001-{digit * 16}.txt", "text\n")
    cause = f"-{'b' * 16}.txt: the same shard as train-00000-of-00001-{'a' * 16}.txt; remove one of them"
    assert refusal(tmp_path).endswith(cause)


def test_a_split_that_is_given_replaces_that_of_the_layout(tmp_path: Path) -> None:
    wikitext(tmp_path / "corpus")
    mine = write(tmp_path / "mine.txt", "a word of mine\n")
    found = prepared(tmp_path, test=[mine])
    assert found["test"] == ["a word <unk> <unk>"]
    assert found["valid"][1] == "= <unk> ="


def test_a_folder_of_text_has_no_layout(tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt", "wiki.test.tokens"):
        write(tmp_path / name, "text\n")
    assert layout_of(tmp_path) is None
    write(tmp_path / "other/train-00000-of-00002.txt", "text\n")
    write(tmp_path / "other/train-00001-of-00002.txt", "text\n")
    assert layout_of(tmp_path / "other") is None
    assert len(text_files([tmp_path / "other"])) == 2


def refusal(folder: Path, *others: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(output=folder / "dataset", train=[folder / "corpus", *others], vocabulary="words")
    assert "\n" not in str(error.value)
    assert not (folder / "dataset").exists()
    return str(error.value).removeprefix(f"{folder / 'corpus'}")


@pytest.mark.parametrize(
    ("make", "missing", "cause"),
    [
        (billion_words, f"{TRAINING}/news.en-00099-of-00100", "incomplete, without news.en-00099-of-00100;"),
        (billion_words, f"{TRAINING}/news.en-00001-of-00100", "incomplete, without news.en-00001-of-00100;"),
        (billion_words, f"{HELD_OUT}/news.en.heldout-00000-of-00050", "heldout-00000-of-00050: missing;"),
        (billion_words, f"{HELD_OUT}/news.en.heldout-00001-of-00050", "heldout-00001-of-00050: missing;"),
        (wikitext, "wiki.test.tokens", "wiki.test.tokens: missing; download WikiText again"),
        (c4, "c4-train.00001-of-00003.json.gz", "without c4-train.00001-of-00003.json.gz; download what"),
        (c4, "c4-validation.00000-of-00002.json.gz", "without c4-validation.00000-of-00002.json.gz"),
    ],
)
def test_what_is_missing_of_a_layout_is_named(make, missing: str, cause: str, tmp_path: Path) -> None:
    (make(tmp_path / "corpus") / missing).unlink()
    assert cause in refusal(tmp_path)


def test_an_empty_shard_is_named(tmp_path: Path) -> None:
    write(billion_words(tmp_path / "corpus") / TRAINING / "news.en-00037-of-00100", "")
    assert refusal(tmp_path).endswith("news.en-00037-of-00100: an empty shard; download it again")


def test_a_folder_without_training_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus" / TRAINING).mkdir(parents=True)
    assert "no news.en-00001-of-00100 and so on; unpack it again" in refusal(tmp_path)


def test_a_corpus_and_other_text_are_not_one_text(tmp_path: Path) -> None:
    wikitext(tmp_path / "corpus")
    other = write(tmp_path / "other.txt", "text\n")
    assert refusal(tmp_path, other) == ": holds a whole corpus (WikiText); give it alone"


def test_missing_shards_of_any_name_are_named(tmp_path: Path) -> None:
    for number in (1, 3, 4):
        write(tmp_path / f"corpus/part-{number:02}-of-12.txt", "text\n")
    missing = ", ".join(f"part-{number:02}-of-12.txt" for number in (0, 2, 5, 6, 7))
    assert refusal(tmp_path).startswith(
        f": incomplete, without {missing} and 4 more; download what is missing"
    )
    given = sorted((tmp_path / "corpus").iterdir())
    assert text_files(given) == given
    for number in range(1, 13):
        write(tmp_path / f"corpus/part-{number:02}-of-12.txt", "text\n")
    assert len(text_files([tmp_path / "corpus"])) == 12


def test_a_folder_of_several_formats_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "corpus/README.md", "text\n")
    write(tmp_path / "corpus/a.jsonl.gz", b"")
    write(tmp_path / "corpus/b.parquet", b"")
    found = "JSON lines (a.jsonl.gz) and parquet (b.parquet) and plain text (README.md)"
    assert refusal(tmp_path) == f": mixes {found}; give the files that are the text by name"
