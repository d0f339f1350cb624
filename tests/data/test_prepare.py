import gzip
import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsegate.data import Dataset, TextOptions, prepare
from sparsegate.data.normalization import PLAIN, TOKENIZED, normalize
from tests.data.making import dataset_of, lines, prose, write
from tests.helpers.damage import damages

KINDS = [("words", None), ("words", 9), ("characters", None), ("subwords", 270), ("bytes", None)]


def sentences_of(dataset: Dataset, split: str) -> list[str]:
    return dataset.vocabulary.decode(dataset.split(split).token_N[:-1]).split("\n")


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=60)
@example(several=["a\u0301 e\u0308 \u2126"], kind=("bytes", None), tokenized=False)
@given(several=st.lists(lines, min_size=1, max_size=8), kind=st.sampled_from(KINDS), tokenized=st.booleans())
def test_counts_and_tokens_are_those_of_plain_python(
    several: list[str],
    kind: tuple[str, int | None],
    tokenized: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    several = [line.replace("\x00", "").removesuffix("\r") for line in several]
    several[0] = several[0].lstrip("\ufeff")
    text = write(folder / "text.txt", "".join(f"{line}\n" for line in several))
    dataset = prepare(
        output=folder / "dataset",
        train=[text],
        vocabulary=kind[0],
        vocabulary_size=kind[1],
        tokenized=tokenized,
        valid_share=0,
        test_share=0,
        text=TextOptions(keep_blank_lines=True),
    )
    split = dataset.split("train")
    words = (TOKENIZED if tokenized else PLAIN).words
    assert split.num_sentences == len(several)
    assert split.num_words == sum(len(words(line)) for line in several)
    assert split.num_bytes == sum(len(normalize(line).encode()) + 1 for line in several)
    ids = [[*dataset.vocabulary.encode(line), dataset.vocabulary.end_id] for line in several]
    assert split.token_N.tolist() == [token for sentence in ids for token in sentence]
    assert split.sentence_end_N.tolist() == np.cumsum([len(sentence) for sentence in ids]).tolist()
    if kind[0] == "bytes":
        assert split.num_tokens == split.num_bytes
    dataset.verify()


def test_the_vocabulary_knows_the_train_split_alone(tmp_path: Path) -> None:
    train, valid = write(tmp_path / "train", "a b\n"), write(tmp_path / "valid", "a c\n")
    dataset = prepare(output=tmp_path / "dataset", train=[train], valid=[valid], vocabulary="words")
    assert dataset.vocabulary.to_json()["words"] == ["</s>", "<unk>", "a", "b"]
    assert sentences_of(dataset, "valid") == ["a <unk>"]
    held_out = prepare(
        output=tmp_path / "held_out",
        train=[write(tmp_path / "text", "".join(f"word{number}\n" for number in range(100)))],
        vocabulary="words",
        valid_share=0.5,
    )
    assert held_out.vocabulary.size == 2 + held_out.split("train").num_sentences < 80
    assert set(sentences_of(held_out, "valid")) == {"<unk>"}


def test_several_files_and_folders_are_one_text(tmp_path: Path) -> None:
    write(tmp_path / "folder/b.jsonl", '{"text": "two"}\n')
    write(tmp_path / "folder/c.jsonl.gz", gzip.compress(json.dumps({"text": "three\nfour"}).encode()))
    first, valid = write(tmp_path / "a.txt", "one"), write(tmp_path / "valid.txt", "one\n")
    dataset = prepare(
        output=tmp_path / "dataset", train=[first, tmp_path / "folder"], valid=[valid], vocabulary="bytes"
    )
    assert sentences_of(dataset, "train") == ["one", "two", "three", "four"]
    assert [source.name for source in dataset.split("train").manifest.sources] == [
        "a.txt", "folder/b.jsonl", "folder/c.jsonl.gz"
    ]  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "dataset/dataset.json").read_text()


def hold_out(folder: Path, text: str, **options: object) -> dict[str, list[str]]:
    options = {"vocabulary": "bytes", "valid_share": 0.1, "test_share": 0.2} | options
    dataset = prepare(output=folder / "dataset", train=[write(folder / "text", text)], **options)
    return {split: sentences_of(dataset, split) for split in dataset.splits}


def test_lines_are_held_out_by_their_content_in_the_shares_asked_for(tmp_path: Path) -> None:
    several = [f"line {number % 1500}" for number in range(2000)]
    splits = hold_out(tmp_path, "".join(f"{line}\n" for line in several))
    assert list(splits) == ["train", "valid", "test"]
    assert Counter(line for split in splits.values() for line in split) == Counter(several)
    assert not set(splits["train"]) & set(splits["valid"])
    assert not set(splits["train"]) & set(splits["test"])
    assert not set(splits["valid"]) & set(splits["test"])
    assert 0.07 < len(splits["valid"]) / len(several) < 0.13
    assert 0.16 < len(splits["test"]) / len(several) < 0.24
    shuffled = hold_out(tmp_path / "again", "".join(f"{line}\n" for line in sorted(several)))
    assert {split: sorted(found) for split, found in shuffled.items()} == {
        split: sorted(found) for split, found in splits.items()
    }


def test_lines_that_are_stored_alike_are_held_out_alike(tmp_path: Path) -> None:
    composed = [f"caf\u00e9 {number}" for number in range(500)]
    text = "".join(f"{line}\n{unicodedata.normalize('NFD', line)}\n" for line in composed)
    splits = hold_out(tmp_path, text)
    assert sorted(line for split in splits.values() for line in split) == sorted(2 * composed)
    assert sum(len(set(split)) for split in splits.values()) == len(composed)


def test_whole_files_are_held_out_by_their_content(tmp_path: Path) -> None:
    texts = [f"file {number}\n" * 20 for number in range(12)]
    splits = {}
    for order in (texts, texts[::-1]):
        folder = tmp_path / f"from {order[0][5:7].strip()}"
        files = [write(folder / f"{place}.txt", text) for place, text in enumerate(order)]
        dataset = prepare(
            output=folder / "dataset", train=files, vocabulary="bytes", hold_out="files", valid_share=0.2
        )
        assert dataset.manifest.held_out is not None
        assert dataset.manifest.held_out.model_dump() == {"by": "files", "valid": 0.2, "test": 0.01}
        splits[folder] = {split: {*sentences_of(dataset, split)} for split in dataset.splits}
        assert [len(splits[folder][split]) for split in ("train", "valid", "test")] == [8, 3, 1]
    first, second = splits.values()
    assert first == second


def test_nothing_is_held_out_where_files_are_given_or_shares_are_zero(tmp_path: Path) -> None:
    assert list(hold_out(tmp_path / "a", prose(50), valid_share=0, test_share=0)) == ["train"]
    assert list(hold_out(tmp_path / "b", prose(50), valid_share=0)) == ["train", "test"]
    valid = write(tmp_path / "valid", "text")
    assert list(hold_out(tmp_path / "c", prose(50), valid=[valid])) == ["train", "valid"]


def test_a_vocabulary_is_taken_over_from_a_dataset(tmp_path: Path) -> None:
    first = prepare(
        output=tmp_path / "first",
        train=[write(tmp_path / "train", "we do n't <unk>\n")],
        valid=[write(tmp_path / "valid", "n't\n")],
        vocabulary="words",
        tokenized=True,
    )
    text = write(tmp_path / "test", "n't <unk> go\n")
    other = prepare(output=tmp_path / "other", train=[], test=[text], vocabulary_from=first.directory)
    other.require_vocabulary(first.vocabulary)
    assert list(other.splits) == ["test"]
    assert sentences_of(other, "test") == ["n't <unk> <unk>"]
    assert other.manifest.normalization == "tokenized-1"


def test_already_tokenised_text_may_meet_a_vocabulary_of_plain_text(tmp_path: Path) -> None:
    first = dataset_of(tmp_path, "it can @ home\n")
    text = write(tmp_path / "text", "home @-@ can <unk>\n")
    other = prepare(
        output=tmp_path / "other", train=[], test=[text], vocabulary_from=first.directory, tokenized=True
    )
    other.require_vocabulary(first.vocabulary)
    assert (other.split("test").num_words, other.manifest.normalization) == (4, "tokenized-1")
    assert sentences_of(other, "test") == ["home <unk> can <unk>"]


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for kind, size in KINDS:
        one, two = (
            dataset_of(tmp_path / f"{kind}{size}{n}", prose(70), vocabulary=kind, size=size) for n in "12"
        )
        for name in only(one.directory):
            assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes()


def collector(steps: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda done, total: steps.append((done, total))


def test_progress_rises_to_the_bytes_of_all_passes(tmp_path: Path) -> None:
    text = write(tmp_path / "text", prose(50_000))
    size = text.stat().st_size
    passes = {"bytes": 1, "words": 2}
    for kind, expected in passes.items():
        steps: list[tuple[int, int]] = []
        prepare(output=tmp_path / kind, train=[text], vocabulary=kind, progress=collector(steps))
        assert {total for _, total in steps} == {expected * size}
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == expected * size
        assert len(steps) > 3


def refused(tmp_path: Path, **options: object) -> str:
    """The one line that `prepare` refuses with; it leaves everything as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError)) as error:
        prepare(output=tmp_path / "dataset", **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


WORDS = {"vocabulary": "words", "train": ["text"]}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({**WORDS, "train": []}, "train: no text; give at least one file"),
        ({"train": ["text"]}, "vocabulary: name its kind (words, subwords, characters, bytes), or give"),
        ({**WORDS, "vocabulary": "phrases"}, "vocabulary ('phrases') must be one of words, subwords"),
        ({**WORDS, "vocabulary": "subwords"}, "vocabulary_size: subwords need one, such as 8192"),
        ({**WORDS, "train": [], "test": ["text"]}, "train: no text to make a vocabulary from;"),
        ({**WORDS, "valid_share": 1.0}, "valid_share (1.0) must be at least 0"),
        ({**WORDS, "test_share": -0.1}, "test_share (-0.1) must be at least 0"),
        ({**WORDS, "valid_share": 0.5, "test_share": 0.5}, "(1 together) must leave text for train"),
        ({**WORDS, "hold_out": "pages"}, "hold_out ('pages') must be 'lines' or 'files'"),
        ({**WORDS, "hold_out": "files"}, "hold_out: 1 files are too few to hold out files"),
        ({**WORDS, "train": ["absent"]}, "absent: no such file or directory"),
        ({**WORDS, "train": ["empty"]}, "train: no line for it in empty, blank ones not counted; give more"),
        ({**WORDS, "valid": ["empty"]}, "valid: no line for it in empty"),
        ({**WORDS, "train": ["binary"]}, "binary, line 2: a NUL byte"),
        ({**WORDS, "train": ["binary"], "vocabulary": "subwords", "vocabulary_size": 300}, "binary, line 2:"),
        ({**WORDS, "train": ["text", "text"]}, "text: given twice, for train and for train"),
        ({**WORDS, "test": ["text"]}, "text: given twice, for train and for test"),
        (
            {"vocabulary_from": "empty", "train": ["text"]},
            "empty: no words; give a file with one word a line",
        ),
        ({"vocabulary_from": ".", "train": ["text"]}, ": not a dataset (it has no dataset.json)"),
        (
            {**WORDS, "vocabulary_from": "."},
            "vocabulary_from brings kind and words; leave out",
        ),
    ],
)
def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(
    options: dict[str, object], cause: str, tmp_path: Path
) -> None:
    write(tmp_path / "text", prose(100))
    write(tmp_path / "empty", "")
    write(tmp_path / "binary", b"text\n\0\n")
    for key in ("train", "valid", "test"):
        options = {**options, key: [tmp_path / name for name in options.get(key, [])]}
    if "vocabulary_from" in options:
        options = {**options, "vocabulary_from": tmp_path / str(options["vocabulary_from"])}
    assert cause in refused(tmp_path, **options)


def test_an_existing_dataset_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    dataset_of(tmp_path, prose(20))
    assert "exists already" in refused(tmp_path, train=[tmp_path / "absent"], vocabulary="words")
    Dataset.open(tmp_path / "dataset").verify()


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.txt.gz"])
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.nightly)])
def test_damaged_text_is_prepared_or_refused_in_one_line(name: str, count: int, tmp_path: Path) -> None:
    content = prose(40).encode()
    if name.endswith(".jsonl"):
        content = b"".join(json.dumps({"text": line}).encode() + b"\n" for line in prose(40).splitlines())
    content = gzip.compress(content) if name.endswith(".gz") else content
    options = {"train": [tmp_path / name], "vocabulary": "words", "valid_share": 0, "test_share": 0}
    refusals = 0
    for number, (_, damaged) in enumerate(damages(content, count)):
        write(tmp_path / name, damaged)
        try:
            prepare(output=tmp_path / str(number), **options).verify()
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error)
            assert name in str(error)
            assert not (tmp_path / str(number)).exists()
    assert refusals > count / 6
    assert not [path for path in only(tmp_path) if path.startswith(".")]
