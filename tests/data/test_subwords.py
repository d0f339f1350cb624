import json

import pytest
from tokenizers import Tokenizer

from sparsegate.data import ByteVocabulary, SubwordVocabulary
from sparsegate.data.normalization import PLAIN
from tests.data.making import prose

BATCHES = [prose(60).splitlines(), prose(200).splitlines()[60:]]


def test_training_twice_gives_the_same_merges() -> None:
    once, again = (SubwordVocabulary.train(BATCHES, size=320, normalization=PLAIN) for _ in range(2))
    assert once.to_json() == again.to_json()


def test_training_is_on_text_in_nfc() -> None:
    decomposed = SubwordVocabulary.train([["e\u0301e\u0301 e\u0301e\u0301"]], size=300, normalization=PLAIN)
    composed = SubwordVocabulary.train([["éé éé"]], size=300, normalization=PLAIN)
    assert decomposed.to_json() == composed.to_json()


def test_the_vocabulary_has_the_size_asked_for_or_what_the_text_gives() -> None:
    assert SubwordVocabulary.train(BATCHES, size=280, normalization=PLAIN).size == 280
    assert SubwordVocabulary.train([["ab ab"]], size=300, normalization=PLAIN).size == 258
    assert SubwordVocabulary.train([], size=300, normalization=PLAIN).size == 257


def test_ids_are_those_that_the_merges_make_one_after_the_other() -> None:
    """An oracle: apply the first merge that fits, again and again, to the bytes of each word."""
    vocabulary = SubwordVocabulary.train(BATCHES, size=300, normalization=PLAIN)
    merges = [tuple(merge) for merge in vocabulary.to_json()["merges"]]
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet = sorted({*alphabet, *(chr(256 + place) for place in range(256 - len(alphabet)))})
    pieces = [*alphabet, *dict.fromkeys(left + right for left, right in merges)]
    for word in ("line", "w17", " w3", "zebra"):
        parts = list(word.replace(" ", "\u0120"))
        for left, right in merges:
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == (left, right):
                    parts[place : place + 2] = [left + right]
                else:
                    place += 1
        assert vocabulary.encode(word) == [pieces.index(part) for part in parts]


def test_the_merges_are_all_that_the_tokenizer_learned() -> None:
    vocabulary = SubwordVocabulary.train(BATCHES, size=400, normalization=PLAIN)
    stored = json.loads(vocabulary._tokenizer.to_str())
    assert len(stored["model"]["vocab"]) == vocabulary.size - 1 == vocabulary.end_id
    assert stored["added_tokens"] == []
    assert isinstance(vocabulary._tokenizer, Tokenizer)


def test_an_error_while_reading_stops_the_training() -> None:
    def broken():
        yield ["some text"]
        raise ValueError("text.txt, line 2: byte 0xff is not UTF-8")

    with pytest.raises(ValueError, match="text.txt, line 2"):
        SubwordVocabulary.train(broken(), size=300, normalization=PLAIN)


def test_a_word_of_a_megabyte_is_learned_from_and_encoded() -> None:
    vocabulary = SubwordVocabulary.train([["ab" * (1 << 19)]], size=300, normalization=PLAIN)
    line = "ab" * (1 << 19)
    assert vocabulary.size == 257 + 7  # two bytes, four, ... up to all 128
    assert vocabulary.decode(vocabulary.encode(line)) == line


def test_bytes_are_utf8_and_broken_ones_decode_to_a_replacement() -> None:
    vocabulary = ByteVocabulary(normalization=PLAIN)
    assert vocabulary.encode("é") == [0xC3, 0xA9]
    assert vocabulary.decode([0xC3, 10, 0xA9]) == "\ufffd\n\ufffd"
