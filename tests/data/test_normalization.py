import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data.normalization import PLAIN, TOKENIZED, normalization_named, normalize
from tests.data.making import lines


def is_word_character(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM" or character in "_\u200c\u200d"


def words_by_the_rules(line: str) -> list[str]:
    """The four rules of the docstring, one character after the other."""
    line = unicodedata.normalize("NFC", line)
    words: list[str] = []
    position = 0
    while position < len(line):
        first = line[position]
        end = position + 1
        clitic = first in "'’" and 0 < position < len(line) - 1
        clitic = clitic and is_word_character(line[position - 1]) and is_word_character(line[end])
        if first.isspace():
            position = end
            continue
        if is_word_character(first) or clitic:
            while end < len(line) and is_word_character(line[end]):
                end += 1
        elif first in string.punctuation:
            while end < len(line) and line[end] == first:
                end += 1
        words.append(line[position:end])
        position = end
    return words


@given(lines)
def test_plain_words_are_those_of_the_stated_rules(line: str) -> None:
    assert PLAIN.words(line) == words_by_the_rules(line)


@given(lines)
def test_words_hold_every_character_that_is_not_white_space(line: str) -> None:
    for normalization in (PLAIN, TOKENIZED):
        assert "".join(normalization.words(line)) == "".join(normalize(line).split())


@given(lines)
def test_tokenized_words_stand_between_white_space(line: str) -> None:
    assert TOKENIZED.words(line) == normalize(line).split()


@given(st.lists(lines, max_size=5))
def test_words_of_several_lines_are_counted_line_by_line(several: list[str]) -> None:
    for normalization in (PLAIN, TOKENIZED):
        counted = normalization.count_words(several)
        assert counted == sum(len(normalization.words(line)) for line in several)
        assert normalization.count_words(several) == sum(len(normalization.words(line)) for line in several)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Don't", ["Don", "'t"]),
        ("the dogs' bone", ["the", "dogs", "'", "bone"]),
        ("rock ’n’ roll", ["rock", "’", "n", "’", "roll"]),
        ("O’Brien''s", ["O", "’Brien", "''", "s"]),
        ("1,000.5 m²", ["1", ",", "000", ".", "5", "m²"]),
        ("well-known --- yes...", ["well", "-", "known", "---", "yes", "..."]),
        ("e\u0301te\u0301", ["été"]),
        ("क्\u200dष नमस्ते", ["क्\u200dष", "नमस्ते"]),
        ("snake_case += __x__", ["snake_case", "+", "=", "__x__"]),
        ("<unk> </s>", ["<", "unk", ">", "<", "/", "s", ">"]),
        ("東京 100%", ["東京", "100", "%"]),
        ("a\u2028b\u00a0c\x0cd", ["a", "b", "c", "d"]),
    ],
)
def test_examples(line: str, words: list[str]) -> None:
    assert PLAIN.words(line) == words


def test_a_normalization_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'plain-2' is unknown; this version knows plain-1, tokenized-1"):
        normalization_named("plain-2")
