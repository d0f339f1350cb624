import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data import ByteVocabulary, SubwordVocabulary, WordVocabulary
from sparsegate.data.normalization import PLAIN
from sparsegate.decoding.text import TextGrowth

BYTES = ByteVocabulary(normalization=PLAIN)
WORDS = WordVocabulary(words=["</s>", "<unk>", "a", "bb", "."], counts=[1] * 5, normalization=PLAIN)
SUBWORDS = SubwordVocabulary.train([["das größte, größer als über"] * 9], size=300, normalization=PLAIN)

texts = st.text(alphabet="aü𝄞\n ", max_size=12)
stops = st.lists(st.text(alphabet="abü𝄞\n ", min_size=1, max_size=3), max_size=3)
each_vocabulary = pytest.mark.parametrize(
    "vocabulary", [BYTES, WORDS, SUBWORDS], ids=["bytes", "words", "subwords"]
)


def grow(vocabulary, before, after, stop):
    """The pieces of a text, and whether it was stopped."""
    growth = TextGrowth(vocabulary=vocabulary, before=before, stop=stop)
    pieces = []
    for token in after:
        pieces.append(growth.add(token))
        if growth.stopped:
            return pieces, True
    return [*pieces, growth.rest()], False


def plainly(vocabulary, before, after, stop):
    """The oracle: decode everything after every token, and look for the stops in all of it."""
    text = ""
    for end in range(1, len(after) + 1):
        text = vocabulary.decode(before + after[:end]).removeprefix(vocabulary.decode(before))
        found = [text.find(each) for each in stop if each in text]
        if found:
            return text[: min(found)], True
    return text, False


@each_vocabulary
@given(data=st.data(), stop=stops)
def test_pieces_add_up_to_the_text_before_the_stop(vocabulary, data, stop):
    """Of any tokens, also such that make no text."""
    before = vocabulary.encode_text(data.draw(texts))
    after = data.draw(st.lists(st.integers(0, vocabulary.size - 1), max_size=12))
    pieces, stopped = grow(vocabulary, before, after, stop)
    assert ("".join(pieces), stopped) == plainly(vocabulary, before, after, stop)


@given(before=texts, after=texts, stop=stops)
def test_pieces_add_up_whichever_way_characters_are_split(before, after, stop):
    tokens = BYTES.encode_text(before), BYTES.encode_text(after)
    pieces, stopped = grow(BYTES, *tokens, stop)
    assert ("".join(pieces), stopped) == plainly(BYTES, *tokens, stop)


def test_nothing_is_given_out_that_may_begin_a_stop_and_all_else_is():
    growth = TextGrowth(vocabulary=BYTES, before=[], stop=["abc", "ü"])
    pieces = [growth.add(byte) for byte in b"xaabdab"]
    assert pieces == ["x", "", "a", "", "abd", "", ""]
    assert growth.rest() == "ab"


def test_half_a_character_is_held_back():
    growth = TextGrowth(vocabulary=BYTES, before=[], stop=[])
    assert [growth.add(byte) for byte in "a𝄞b".encode()] == ["a", "", "", "", "𝄞", "b"]
