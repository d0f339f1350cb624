import gzip
from pathlib import Path

import pytest

from sparsegate.data import prepare
from sparsegate.data.normalization import TOKENIZED
from sparsegate.data.word_list import read_word_list
from tests.data.making import write


@pytest.mark.parametrize(
    ("content", "words", "counts"),
    [
        ("b\na\n", ["b", "a"], [0, 0, 0, 0]),
        ("b 7\na\t3\n", ["b", "a"], [0, 0, 7, 3]),
        ("b\r\na", ["b", "a"], [0, 0, 0, 0]),
        ("</S>\n<S>\n<UNK>\nb\na\n", ["<S>", "b", "a"], [0, 0, 0, 0, 0]),
        ("b 9\n<unk> 5\na 3\n</s> 4\n", ["b", "a"], [4, 5, 9, 3]),
        ("e\u0301\n\u212b\n", ["\u00e9", "\u00c5"], [0, 0, 0, 0]),
        ("é\n3\n", ["é", "3"], [0, 0, 0, 0]),
    ],
)
def test_words_stand_in_the_order_of_the_file_after_the_special_ones(
    content: str, words: list[str], counts: list[int], tmp_path: Path
) -> None:
    for path in (
        write(tmp_path / "words.txt", content),
        write(tmp_path / "words.txt.gz", gzip.compress(content.encode())),
    ):
        vocabulary = read_word_list(path, normalization=TOKENIZED)
        assert vocabulary.to_json()["words"] == ["</s>", "<unk>", *words]
        assert vocabulary.counts == counts


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", ": no words; give a file with one word a line"),
        (b"a\n\nb\n", ", line 2: '' is not one word, alone or with its count"),
        (b"a\nb c\n", ", line 2: 'b c' is not one word, alone or with its count"),
        (b"a 3 4\n", ", line 1: 'a 3 4' is not one word"),
        (b"a -3\n", ", line 1: 'a -3' is not one word"),
        (b"a 3\nb\n", ", line 2: some lines have a count and others none;"),
        (b"a\nb\na\n", ", line 3: 'a' stands in line 1 as well; remove one of them"),
        ("\u00e9\ne\u0301\n".encode(), ", line 2: '\u00e9' stands in line 1 as well; remove one of them"),
        (b"<UNK>\n<unk>\n", ", line 2: '<unk>' stands in line 1 as well"),
        (b"a\n" + b"b" * 129, ", line 2: '" + "b" * 40 + "'... is longer than 128 characters"),
        (b"a\n\xff\n", ", line 2: byte 0xff is not UTF-8"),
    ],
)
def test_what_is_no_list_of_words_is_refused_with_its_line(
    content: bytes, cause: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "words.txt", content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_word_list(path, normalization=TOKENIZED)
    assert str(error.value).startswith(f"{path}{cause}")


def test_a_dataset_takes_a_list_over_and_refuses_one_of_another_size(tmp_path: Path) -> None:
    words = write(tmp_path / "words.txt", "</S>\n<S>\n<UNK>\nthe\ncat\n")
    text = write(tmp_path / "text.txt", "the cat <UNK> sat\n")
    options = {"train": [text], "tokenized": True, "valid_share": 0, "test_share": 0}
    dataset = prepare(output=tmp_path / "five", vocabulary_from=words, vocabulary_size=5, **options)
    assert dataset.split("train").token_N.tolist() == [3, 4, 1, 1, 0]
    with pytest.raises(
        ValueError, match=r"words.txt: has 5 words, special ones included, and not the 793,471"
    ):
        prepare(output=tmp_path / "more", vocabulary_from=words, vocabulary_size=793_471, **options)
    with pytest.raises(ValueError, match=r"five: has 5 words, special ones included, and not the 6 of"):
        prepare(output=tmp_path / "more", vocabulary_from=tmp_path / "five", vocabulary_size=6, **options)
    assert not (tmp_path / "more").exists()
