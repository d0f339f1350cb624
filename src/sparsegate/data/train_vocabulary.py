"""Vocabularies made from text."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice
from typing import Literal, get_args

from .normalization import Normalization, normalize
from .vocabulary import UNKNOWN, Vocabulary
from .words import MAX_WORD_LENGTH, CharacterVocabulary, WordVocabulary

VocabularyKind = Literal["words", "subwords", "characters", "bytes"]
CountedKind = Literal["words", "characters"]
KINDS: tuple[str, ...] = get_args(VocabularyKind)
COUNTED_KINDS: tuple[str, ...] = get_args(CountedKind)


def check_size(kind: VocabularyKind, size: int | None, min_count: int) -> None:
    """ValueError in one line for a size or least count that the kind cannot have."""
    if kind not in KINDS:
        raise ValueError(f"vocabulary ({kind!r}) must be one of {', '.join(KINDS)}")
    smallest = {"words": 3, "characters": 3, "subwords": 258, "bytes": 256}[kind]
    if kind == "subwords" and size is None:
        raise ValueError("vocabulary_size: subwords need one, such as 8192")
    if kind == "bytes" and size not in (None, 256):
        raise ValueError(f"vocabulary_size ({size}): bytes always have 256; leave it out")
    if size is not None and not smallest <= size < 1 << 31:
        raise ValueError(
            f"vocabulary_size ({size}) must be at least {smallest} for {kind}, and less than 2^31"
        )
    if min_count < 1:
        raise ValueError(f"min_count ({min_count}) must be at least 1")
    if min_count > 1 and kind not in COUNTED_KINDS:
        raise ValueError(f"min_count ({min_count}): {kind} are not chosen by their counts; leave it out")


def count_entries(
    kind: CountedKind, batches: Iterable[list[str]], *, normalization: Normalization
) -> Counter[str]:
    """How often each word or character stands in the lines, line ends as ``"\\n"``."""
    match kind:
        case "words":
            return count_words(batches, normalization)
        case "characters":
            return count_characters(batches)


def vocabulary_of_counts(
    kind: CountedKind,
    count: Counter[str],
    *,
    size: int | None,
    min_count: int,
    normalization: Normalization,
) -> Vocabulary:
    """The vocabulary of what `count_entries` counted."""
    made = WordVocabulary if kind == "words" else CharacterVocabulary
    return made.from_counts(count, size=size, min_count=min_count, normalization=normalization)


def count_words(batches: Iterable[list[str]], normalization: Normalization) -> Counter[str]:
    """How often each word stands in the lines, line ends as ``"\\n"``; too long words are unknown.

    Memory grows with the number of distinct words of up to 128 characters, and with nothing else.
    """
    count: Counter[str] = Counter()
    for lines in batches:
        known = len(count)
        count.update(chain.from_iterable(map(normalization.split, map(normalize, lines))))
        new = islice(reversed(count), len(count) - known)  # what is new in a dictionary stands last
        for word in [word for word in new if len(word) > MAX_WORD_LENGTH]:
            count[UNKNOWN] += count.pop(word)
        count["\n"] += len(lines)
    return count


def count_characters(batches: Iterable[list[str]]) -> Counter[str]:
    """How often each character stands in the lines in NFC, line ends as ``"\\n"``."""
    count: Counter[str] = Counter()
    for lines in batches:
        count.update(normalize("\n".join((*lines, ""))))
    return count
