"""A vocabulary of words out of a plain file, such as the one that the 1 Billion Word benchmark comes with."""

from collections.abc import Iterator
from pathlib import Path

from .normalization import Normalization, normalize
from .spans import whole
from .text import read_lines
from .text_options import TextOptions
from .vocabulary import END, UNKNOWN
from .words import MAX_WORD_LENGTH, WordVocabulary

_SPECIAL = {END: END, "</S>": END, UNKNOWN: UNKNOWN, "<UNK>": UNKNOWN}


def read_word_list(path: Path, *, normalization: Normalization) -> WordVocabulary:
    """The words of a file, one a line, each alone or followed by white space and its count.

    ``</s>`` and ``<unk>``, also in capitals, may stand anywhere or be absent: they become ids 0 and 1, and
    the others follow in the order of the file, in NFC like the text. Sampled softmax takes that order for the
    order of their frequency.

    ValueError in one line that names file and line for what is no such list.
    """
    line_of: dict[str, int] = {}
    count_of: dict[str, int] = {END: 0, UNKNOWN: 0}
    counted: bool | None = None
    for number, line in _numbered_lines(path):
        where = f"{path}, line {number}"
        word, count = _entry(normalize(line), where)
        if counted not in (None, count is not None):
            raise ValueError(
                f"{where}: some lines have a count and others none; give all of them one, or none"
            )
        counted = count is not None
        word = _SPECIAL.get(word, word)
        if word in line_of:
            raise ValueError(f"{where}: {word!r} stands in line {line_of[word]} as well; remove one of them")
        line_of[word] = number
        count_of[word] = count or 0
    if not line_of:
        raise ValueError(f"{path}: no words; give a file with one word a line")
    return WordVocabulary(words=list(count_of), counts=list(count_of.values()), normalization=normalization)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    options = TextOptions(keep_blank_lines=True)
    for lines in read_lines(whole(path), options=options, advance=lambda num_bytes: None):
        for line in lines:
            number += 1
            yield number, line


def _entry(line: str, where: str) -> tuple[str, int | None]:
    match line.split():
        case [word]:
            count = None
        case [word, digits] if digits.isascii() and digits.isdigit():
            count = int(digits)
        case _:
            raise ValueError(f"{where}: {line[:40]!r} is not one word, alone or with its count")
    if len(word) > MAX_WORD_LENGTH:
        raise ValueError(f"{where}: {word[:40]!r}... is longer than {MAX_WORD_LENGTH} characters; remove it")
    return word, count
