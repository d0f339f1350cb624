"""Vocabularies made from text."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice
from typing import Literal, get_args

from .normalization import Normalization, normalize
from .subwords import ByteVocabulary, SubwordVocabulary
from .vocabulary import UNKNOWN, Vocabulary
from .words import MAX_WORD_LENGTH, CharacterVocabulary, WordVocabulary

VocabularyKind = Literal["words", "subwords", "characters", "bytes"]
KINDS: tuple[str, ...] = get_args(VocabularyKind)


def train_vocabulary(
    kind: VocabularyKind, batches: Iterable[list[str]], *, size: int | None, normalization: Normalization
) -> Vocabulary:
    """The vocabulary of that kind for `batches` of lines, with at most `size` ids."""
    match kind:
        case "words":
            return WordVocabulary.from_counts(
                count_words(batches, normalization), size=size, normalization=normalization
            )
        case "characters":
            return CharacterVocabulary.from_counts(
                count_characters(batches), size=size, normalization=normalization
            )
        case "subwords":
            assert size is not None, "checked with the options"
            return SubwordVocabulary.train(batches, size=size, normalization=normalization)
        case "bytes":
            return ByteVocabulary(normalization=normalization)


def check_size(kind: VocabularyKind, size: int | None) -> None:
    """ValueError in one line for a size that the kind cannot have."""
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


def count_words(batches: Iterable[list[str]], normalization: Normalization) -> Counter[str]:
    """How often each word stands in the lines, line ends as ``"\\n"``; too long words are unknown.

    Memory grows with the number of distinct words of up to 128 characters, and with nothing else.
    """
    count: Counter[str] = Counter()
    for lines in batches:
        known = len(count)
        count.update(chain.from_iterable(map(normalization.split, map(normalize, lines))))
        # New words stand last.
        for word in [word for word in islice(reversed(count), len(count) - known) if _is_too_long(word)]:
            count[UNKNOWN] += count.pop(word)
        count["\n"] += len(lines)
    return count


def _is_too_long(word: str) -> bool:
    return len(word) > MAX_WORD_LENGTH


def count_characters(batches: Iterable[list[str]]) -> Counter[str]:
    """How often each character stands in the lines in NFC, line ends as ``"\\n"``."""
    count: Counter[str] = Counter()
    for lines in batches:
        count.update(normalize("\n".join((*lines, ""))))
    return count
