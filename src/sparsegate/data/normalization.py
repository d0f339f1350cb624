"""The one stated normalisation and tokenisation of plain text.

A *line* ends at a line feed, and a line is a sentence. Every line is brought to Unicode NFC; nothing else
about its characters is changed (case, quotes, accents and white space stay as they are).

``plain-1`` splits a line into *words*, from left to right:

1. A run of word characters is a word. Word characters are letters, numbers and combining marks of every
   script (Unicode categories L, N and M), the underscore, and the two zero-width joiners.
2. An apostrophe (``'`` or ``’``) between two word characters begins a new word: ``don't`` is ``don`` and
   ``'t``, ``company's`` is ``company`` and ``'s``.
3. A run of one and the same ASCII punctuation mark is a word: ``...``, ``--``, ``=====``.
4. Every other character that is not white space (as ``str.isspace`` says) is a word by itself.

White space separates words and is no part of them. ``tokenized-1`` is for text that is already tokenised
(Penn Treebank, WikiText): words are what stands between white space.

Perplexity per word, of every kind of vocabulary, divides by these words plus one end for each line. Bits per
byte divides by the UTF-8 bytes of each line after NFC, plus one for its line end.

The names carry a version: a change of the rules is a new name. Which characters are letters is what the
interpreter's Unicode tables say, so that words of recently added scripts may differ between versions of
Python.
"""

import re
import string
import sys
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache


def normalize(line: str) -> str:
    """`line` in Unicode NFC."""
    return line if line.isascii() else unicodedata.normalize("NFC", line)


@cache
def _combining_marks() -> str:
    """The inside of a character class of all combining marks (category M) and the zero-width joiners."""
    ranges: list[list[int]] = [[0x200C, 0x200D]]
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)).startswith("M"):
            if ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)


@cache
def _plain_word() -> re.Pattern[str]:
    """Matches one word. Frequent parts stand first, for speed; what overlaps is in order."""
    marks = _combining_marks()
    # All marks lie above U+02FF; asking that first spares most text the search through their many ranges.
    begins_with_mark = rf"(?![\x00-\u02ff])[{marks}][\w{marks}]*"
    word = rf"\w+(?:{begins_with_mark})?|{begins_with_mark}"
    clitic = rf"['’](?<=[\w{marks}]['’])(?:{word})"
    same_mark = "|".join(re.escape(mark) + "+" for mark in string.punctuation if mark != "_")
    punctuation = rf"(?=[!-/:-@\[-^`{{-~])(?:{same_mark})"
    return re.compile(rf"{word}|(?!\s)(?:{clitic}|{punctuation}|\S)")


@dataclass(frozen=True)
class Normalization:
    """How a line is split into words; `name` stands in every dataset and vocabulary."""

    name: str

    @property
    def split(self) -> Callable[[str], list[str]]:
        """The words of one line that is in NFC, in order."""
        return str.split if self.name == "tokenized-1" else _plain_word().findall

    def words(self, line: str) -> list[str]:
        """The words of `line` in order.

        >>> PLAIN.words("Don't stop... 3.5% of U.N. naïve_x")
        ['Don', "'t", 'stop', '...', '3', '.', '5', '%', 'of', 'U', '.', 'N', '.', 'naïve_x']
        >>> TOKENIZED.words("we do n't <unk>")
        ['we', 'do', "n't", '<unk>']
        """
        return self.split(normalize(line))

    def count_words(self, lines: Iterable[str]) -> int:
        """Number of words of all `lines`, without their ends."""
        return sum(map(len, map(self.split, map(normalize, lines))))


PLAIN = Normalization("plain-1")
TOKENIZED = Normalization("tokenized-1")
NORMALIZATIONS = {normalization.name: normalization for normalization in (PLAIN, TOKENIZED)}


def normalization_named(name: str) -> Normalization:
    """The normalisation of that name; ValueError for a name that this version does not know."""
    if name not in NORMALIZATIONS:
        raise ValueError(f"normalization {name!r} is unknown; this version knows {', '.join(NORMALIZATIONS)}")
    return NORMALIZATIONS[name]
