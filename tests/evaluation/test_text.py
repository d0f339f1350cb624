from pathlib import Path

import numpy as np
import pytest

from sparsegate.data import Dataset, prepare
from sparsegate.data.normalization import PLAIN
from sparsegate.evaluation.text import PARTS, part_of, pieces_of

LINES = ["Größe counts.", "a b c d", "it's", "the end ... of it", "x", "no, not yet!", "last one"]
KINDS = {"words": None, "characters": None, "bytes": None, "subwords": 300}


def dataset_of(folder: Path, kind: str, lines: list[str], size: int | None = None) -> Dataset:
    folder.mkdir(parents=True)
    (folder / "text").write_text("\n".join(lines))
    (folder / "train").write_text("\n".join(lines[:4]))
    return prepare(
        output=folder / kind,
        train=[folder / "train"],
        test=[folder / "text"],
        vocabulary=kind,
        vocabulary_size=size,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_are_the_split_cut_at_the_end_of_its_middle_sentence(tmp_path: Path, kind: str):
    dataset = dataset_of(tmp_path / "d", kind, LINES, KINDS[kind])
    split = dataset.split("test")
    first, second = (part_of(split, dataset.vocabulary, part) for part in PARTS[1:])
    assert np.array_equal(np.concatenate([first.token_N, second.token_N]), split.token_N)
    for half in (first, second):
        ends = [index + 1 for index, token in enumerate(half.token_N) if token == half.end_id]
        assert half.sentence_end_N.tolist() == ends
        assert ends[-1] == len(half.token_N)
    middle_sentence = len(first.token_N) - int(np.diff(first.sentence_end_N, prepend=0)[-1])
    assert middle_sentence <= split.num_tokens // 2 < len(first.token_N)
    assert part_of(split, dataset.vocabulary, "all") is split


@pytest.mark.parametrize("kind", ["bytes", "subwords"])
def test_words_and_bytes_of_a_half_are_counted_where_its_text_can_be_had_back(tmp_path: Path, kind: str):
    dataset = dataset_of(tmp_path / "d", kind, LINES, KINDS[kind])
    split = dataset.split("test")
    halves = [part_of(split, dataset.vocabulary, part) for part in PARTS[1:]]
    cut = len(halves[0].sentence_end_N)
    for half, lines in zip(halves, (LINES[:cut], LINES[cut:]), strict=True):
        assert half.num_words == sum(len(PLAIN.words(line)) for line in lines)
        assert half.num_bytes == sum(len(line.encode()) + 1 for line in lines)
    assert sum(half.num_words for half in halves) == split.num_words
    assert sum(half.num_bytes for half in halves) == split.num_bytes


def test_counts_do_not_depend_on_how_much_is_decoded_at_once(tmp_path: Path):
    lines = [f"line {number} ..." for number in range(9001)]
    dataset = dataset_of(tmp_path / "d", "bytes", lines)
    split = dataset.split("test")
    halves = [part_of(split, dataset.vocabulary, part) for part in PARTS[1:]]
    assert sum(half.num_words for half in halves) == split.num_words == 9001 * 3
    assert sum(half.num_bytes for half in halves) == split.num_bytes


def test_every_token_of_a_half_is_a_word_or_an_end_where_tokens_are_words(tmp_path: Path):
    dataset = dataset_of(tmp_path / "d", "words", LINES)
    split = dataset.split("test")
    halves = [part_of(split, dataset.vocabulary, part) for part in PARTS[1:]]
    assert sum(half.num_words for half in halves) == split.num_words
    assert [half.num_bytes for half in halves] == [None, None]


def test_what_cannot_be_counted_is_absent(tmp_path: Path):
    dataset = dataset_of(tmp_path / "d", "characters", LINES)
    half = part_of(dataset.split("test"), dataset.vocabulary, "first-half")
    assert (half.num_words, half.num_bytes) == (None, None)


def test_a_part_that_does_not_exist_is_refused(tmp_path: Path):
    dataset = dataset_of(tmp_path / "d", "bytes", ["just one", "", ""])
    split = dataset.split("test")
    with pytest.raises(ValueError, match=r"part \(third\) must be one of all, first-half, second-half"):
        part_of(split, dataset.vocabulary, "third")
    with pytest.raises(ValueError, match=r"test.tokens: too few sentences"):
        part_of(split, dataset.vocabulary, "second-half")


@pytest.mark.parametrize("number", [1, 2, 3, 7, 50])
def test_pieces_are_whole_sentences_and_together_the_split(tmp_path: Path, number: int):
    split = dataset_of(tmp_path / "d", "bytes", LINES * 3).split("test")
    pieces = pieces_of(split, number)
    assert 1 <= len(pieces) <= number
    assert np.array_equal(np.concatenate([piece.token_N for piece in pieces]), split.token_N)
    for piece in pieces:
        ends = [index + 1 for index, token in enumerate(piece.token_N) if token == piece.end_id]
        assert list(piece.sentence_end_N) == ends
        assert ends[-1] == len(piece.token_N)
        longest = int(np.diff(split.sentence_end_N.astype(np.int64), prepend=0).max())
        assert len(piece.token_N) <= split.num_tokens / number + longest
