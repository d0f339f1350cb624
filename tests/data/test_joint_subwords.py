import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sparsegate.data.joint_subwords import JointSubwords, smallest_size
from tests.data.making import lines, prose

ENGLISH = prose(80).splitlines()
FRENCH = [line.replace("line", "ligne").replace("w", "œ") for line in ENGLISH]
TRAINED = JointSubwords.train([ENGLISH, FRENCH], size=275, languages=["fr", "en"])
BYTES = JointSubwords(merges=[], languages=["en", "fr"])

every = pytest.mark.parametrize("vocabulary", [TRAINED, BYTES], ids=["trained", "bytes"])


@every
@given(line=lines)
@example("")
@example(" ")
@example("   many   spaces   ")
@example("\u2581\u2581a\u2581 b")
@example("<2fr> </s> <pad> <0x41>")
@example("e\u0301 é \u0301\u0301 \u0915\u094d\u200d")
@example("👩\u200d👩\u200d👧 🇫🇷")
@example("\x00\x01\x1b[0m\x7f\x85\t\r")
@example("line 7 line 7 1,234,567")
def test_decoding_gives_back_the_very_line(vocabulary: JointSubwords, line: str) -> None:
    assert vocabulary.unknown_id is None
    assert vocabulary.decode(vocabulary.encode(line)) == line


@given(line=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")))
def test_every_character_of_unicode_comes_back(line: str) -> None:
    assert TRAINED.decode(TRAINED.encode(line)) == line


def test_a_line_of_a_hundred_thousand_characters_comes_back() -> None:
    for line in ("ab" * 50_000, "a b " * 25_000, "\u4e2d" * 100_000, " " * 100_000):
        assert TRAINED.decode(TRAINED.encode(line)) == line


def test_special_tokens_stand_first_and_no_text_encodes_to_them() -> None:
    special = [TRAINED.pad_id, TRAINED.begin_id, TRAINED.end_id]
    special += [TRAINED.language_id(language) for language in TRAINED.languages]
    assert TRAINED.languages == ("en", "fr")
    assert special == [0, 1, 2, 3, 4]
    for line in ("<pad>", "<s> </s>", "<2fr> <2en>", *ENGLISH):
        assert min(TRAINED.encode(line)) >= len(special)


def test_special_tokens_decode_to_nothing_but_the_end_to_a_line_end() -> None:
    ids = TRAINED.encode("line 1")
    assert TRAINED.decode([1, *ids, 2, 0, 0]) == "line 1\n"
    assert TRAINED.decode([3, *ids, 2, 4, *ids]) == "line 1\nline 1"
    assert TRAINED.decode([]) == TRAINED.decode([0, 1, 3]) == ""


def test_broken_bytes_of_a_model_decode_to_a_replacement() -> None:
    (*_, last) = BYTES.encode("é")
    assert BYTES.decode([last]) == "\ufffd"


@given(line=lines)
def test_names_are_the_bytes_that_make_the_line(line: str) -> None:
    as_bytes = f" {line}".encode() if line else b""
    names = [bytes([byte]).decode(errors="backslashreplace") for byte in as_bytes]
    assert BYTES.names(BYTES.encode(line)) == names
    if line and line.isascii():
        assert "".join(TRAINED.names(TRAINED.encode(line))) == f" {line}"


def test_names_are_text_with_its_space_and_special_tokens_in_brackets() -> None:
    ids = [0, 1, *TRAINED.encode_source("line", target_language="fr")]
    assert TRAINED.names(ids) == ["<pad>", "<s>", "<2fr>", " line", "</s>"]
    assert BYTES.names(BYTES.encode("é")) == [" ", "\\xc3", "\\xa9"]
    assert TRAINED.names(TRAINED.encode("œ"))[-1].endswith("œ")


def test_a_source_is_the_target_language_the_line_and_the_end() -> None:
    source = TRAINED.encode_source("line 1", target_language="fr")
    assert source == [4, *TRAINED.encode("line 1"), 2]
    assert TRAINED.encode_source("", target_language="en") == [3, 2]
    with pytest.raises(ValueError, match="language 'de' is not in the vocabulary; it has en, fr"):
        TRAINED.encode_source("line 1", target_language="de")


def test_a_word_is_the_same_at_the_beginning_of_a_line_and_within_it() -> None:
    assert TRAINED.encode("line line") == 2 * TRAINED.encode("line")


def test_digits_stand_alone_and_pieces_cross_no_words() -> None:
    for line in ENGLISH + FRENCH:
        pieces = [TRAINED.decode([token]) for token in TRAINED.encode(line)]
        assert all(len(piece) == 1 for piece in pieces if piece[-1:].isdigit())
        assert all(" " not in piece.strip() for piece in pieces)


def test_both_languages_are_learned_from() -> None:
    assert len(TRAINED.encode("line")) == len(TRAINED.encode("ligne")) == 1


def test_the_size_counts_every_id() -> None:
    assert TRAINED.size == 275
    assert BYTES.size == 3 + 2 + 256 == smallest_size(2) - 1
    with pytest.raises(ValueError, match=r"vocabulary_size \(261\) must be at least 262: the bytes, the "):
        JointSubwords.train([ENGLISH], size=261, languages=["en", "fr"])


def test_training_twice_gives_the_same() -> None:
    again = JointSubwords.train([ENGLISH, FRENCH], size=275, languages=["en", "fr"])
    assert again.to_json() == TRAINED.to_json()


def test_other_languages_are_another_meaning_of_ids() -> None:
    other = JointSubwords(merges=[], languages=["de", "fr"])
    assert other.fingerprint != BYTES.fingerprint


def test_the_tokenizers_library_reads_it() -> None:
    tokenizer = Tokenizer.from_str(TRAINED.to_tokenizers())
    for line in (*ENGLISH[:5], "é  x", ""):
        assert [token + 5 for token in tokenizer.encode(line).ids] == TRAINED.encode(line)
        assert tokenizer.decode(tokenizer.encode(line).ids) == line


def test_ids_are_those_that_the_merges_make_one_after_the_other() -> None:
    """An oracle: apply the first merge that fits, again and again, to the bytes of each word."""
    merges = [tuple(merge) for merge in TRAINED.to_json()["merges"]]
    for word in ("line", "ligne", "ninel", "liliel"):
        parts = ["\u0120", *word]
        for left, right in merges:
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == (left, right):
                    parts[place : place + 2] = [left + right]
                else:
                    place += 1
        texts = [TRAINED.decode([TRAINED.end_id, token])[1:] for token in TRAINED.encode(word)]
        assert texts == [part.replace("\u0120", "") for part in parts]
