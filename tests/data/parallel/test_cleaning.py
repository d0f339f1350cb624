import unicodedata

import pytest
from hypothesis import given

from sparsegate.data.parallel import clean_line
from tests.data.making import lines


@given(line=lines)
def test_a_clean_line_is_clean_for_good(line: str) -> None:
    clean = clean_line(line)
    assert clean_line(clean) == clean == clean.strip() == unicodedata.normalize("NFC", clean)
    assert not [character for character in clean if unicodedata.category(character) == "Cc"]


@given(line=lines)
def test_nothing_but_controls_composition_and_ends_is_changed(line: str) -> None:
    """An oracle, character by character."""
    spaced = "".join(
        " " if unicodedata.category(c) == "Cc" else c for c in unicodedata.normalize("NFC", line)
    )
    assert clean_line(line) == spaced.strip()


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        ("a\tb\x1b[0m", "a b [0m"),
        ("\ufeffe\u0301\x85", "\ufeffé"),
        ("two  spaces\u00a0", "two  spaces"),
        ("\x00", ""),
        ("👩\u200d👧", "👩\u200d👧"),
    ],
)
def test_what_becomes_of_curious_characters(line: str, clean: str) -> None:
    assert clean_line(line) == clean
