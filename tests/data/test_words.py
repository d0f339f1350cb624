from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data import CharacterVocabulary, WordVocabulary
from sparsegate.data.normalization import PLAIN, TOKENIZED, normalize
from sparsegate.data.train_vocabulary import check_size, count_words
from tests.data.making import lines, train_vocabulary

batches = st.lists(st.lists(lines, max_size=4), max_size=4)


@given(batches, st.integers(3, 12))
def test_words_stand_by_falling_count_and_the_rest_is_counted_as_unknown(
    batches: list[list[str]], size: int
) -> None:
    vocabulary = train_vocabulary("words", batches, size=size, normalization=PLAIN)
    assert isinstance(vocabulary, WordVocabulary)
    count = Counter(word for lines in batches for line in lines for word in PLAIN.words(line))
    expected = sorted(count, key=lambda word: (-count[word], word))[: size - 2]
    assert vocabulary.to_json()["words"] == ["</s>", "<unk>", *expected]
    unknown = count.total() - sum(count[word] for word in expected)
    assert vocabulary.counts == [sum(map(len, batches)), unknown, *(count[word] for word in expected)]


@given(batches)
def test_counts_are_how_often_each_id_is_in_the_encoded_training_text(batches: list[list[str]]) -> None:
    for normalization in (PLAIN, TOKENIZED):
        vocabulary = train_vocabulary("words", batches, size=6, normalization=normalization)
        assert isinstance(vocabulary, WordVocabulary)
        ids = Counter(token for lines in batches for token in vocabulary.encode_lines(lines).tolist())
        assert vocabulary.counts == [ids[token] for token in range(vocabulary.size)]


@given(batches)
def test_characters_stand_by_falling_count(batches: list[list[str]]) -> None:
    vocabulary = train_vocabulary("characters", batches, size=None, normalization=PLAIN)
    count = Counter(character for lines in batches for line in lines for character in normalize(line))
    expected = sorted(count, key=lambda character: (-count[character], character))
    stored = vocabulary.to_json()
    assert stored["characters"] == ["</s>", "<unk>", *expected]
    assert stored["counts"] == [sum(map(len, batches)), 0, *(count[character] for character in expected)]


def test_specials_in_tokenised_text_are_unknown_words() -> None:
    vocabulary = train_vocabulary("words", [["a <unk> </s> a"]], size=None, normalization=TOKENIZED)
    assert isinstance(vocabulary, WordVocabulary)
    assert vocabulary.to_json()["words"] == ["</s>", "<unk>", "a"]
    assert vocabulary.counts == [1, 2, 2]
    assert vocabulary.encode("a <unk> </s> b") == [2, 1, 1, 1]


def test_words_decode_with_spaces_and_ends_as_line_feeds() -> None:
    vocabulary = train_vocabulary("words", [["a b"]], size=None, normalization=PLAIN)
    assert vocabulary.decode([0, 2, 3, 0, 0, 1, 2]) == "\na b\n\n<unk> a"
    assert vocabulary.decode([]) == ""


def test_a_word_of_a_megabyte_is_unknown_and_is_not_kept_while_counting() -> None:
    batches = [["short " + letter * (1 << 20)] for letter in "abc"]
    assert count_words(batches, PLAIN) == {"short": 3, "<unk>": 3, "\n": 3}
    vocabulary = train_vocabulary("words", batches, size=None, normalization=PLAIN)
    assert vocabulary.encode("short " + "a" * (1 << 20)) == [2, 1]


def test_characters_beyond_the_table_are_unknown() -> None:
    vocabulary = train_vocabulary("characters", [["ab"]], size=None, normalization=PLAIN)
    assert isinstance(vocabulary, CharacterVocabulary)
    assert vocabulary.encode("a\u00e9\U0010ffff\tb") == [2, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("phrases", None, "vocabulary ('phrases') must be one of words, subwords, characters, bytes"),
        ("words", 2, "vocabulary_size (2) must be at least 3 for words"),
        ("characters", 0, "vocabulary_size (0) must be at least 3 for characters"),
        ("subwords", None, "vocabulary_size: subwords need one, such as 8192"),
        ("subwords", 257, "vocabulary_size (257) must be at least 258 for subwords"),
        ("bytes", 300, "vocabulary_size (300): bytes always have 256; leave it out"),
        ("words", 1 << 31, "vocabulary_size (2147483648) must be at least 3 for words, and less than 2^31"),
    ],
)
def test_impossible_sizes_are_refused(kind: str, size: int | None, message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        check_size(kind, size, 1)
    assert str(refusal.value).startswith(message)
