"""Which vocabulary a dataset gets: made from its train split, or taken over."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .dataset import Dataset
from .normalization import PLAIN, TOKENIZED, Normalization
from .subwords import ByteVocabulary, SubwordVocabulary
from .train_vocabulary import KINDS, CountedKind, VocabularyKind, check_size, vocabulary_of_counts
from .vocabulary import Vocabulary
from .word_list import read_word_list


class TrainText(Protocol):
    """The text of the train split, as a vocabulary is made of it."""

    def count(self, kind: CountedKind, normalization: Normalization) -> Counter[str]:
        """How often each entry stands in it; see `train_vocabulary.count_entries`."""

    def lines(self) -> Iterator[list[str]]:
        """All of it, in batches of lines."""


@dataclass(frozen=True, kw_only=True)
class VocabularyChoice:
    """How the vocabulary comes about.

    identity: differs wherever the vocabulary of the same text would.
    reads_text: whether `make` reads the text.
    """

    identity: str
    reads_text: bool
    make: Callable[[TrainText], Vocabulary]


def made(
    *, kind: VocabularyKind | None, size: int | None, min_count: int, tokenized: bool, has_train: bool
) -> VocabularyChoice:
    """The vocabulary of that kind of the train split, with at most `size` ids (None: all), of entries that
    occur at least `min_count` times. ValueError for options that do not fit."""
    if kind is None:
        raise ValueError(f"vocabulary: name its kind ({', '.join(KINDS)}), or give vocabulary_from")
    if not has_train:
        raise ValueError("train: no text to make a vocabulary from; give train files, or vocabulary_from")
    check_size(kind, size, min_count)
    normalization = TOKENIZED if tokenized else PLAIN

    def make(text: TrainText) -> Vocabulary:
        match kind:
            case "words" | "characters":
                count = text.count(kind, normalization)
                return vocabulary_of_counts(
                    kind, count, size=size, min_count=min_count, normalization=normalization
                )
            case "subwords":
                assert size is not None, "checked with the options"
                return SubwordVocabulary.train(text.lines(), size=size, normalization=normalization)
            case "bytes":
                return ByteVocabulary(normalization=normalization)

    identity = f"{kind} {size} {min_count} {normalization.name}"
    return VocabularyChoice(identity=identity, reads_text=kind != "bytes", make=make)


def taken_over(
    path: Path, *, kind: VocabularyKind | None, size: int | None, min_count: int, tokenized: bool
) -> VocabularyChoice:
    """The vocabulary of the dataset or the list of words at `path`.

    ValueError for options that do not fit, and if it has not `size` ids, where that is given.
    """
    own = [f"vocabulary ({kind!r})"] * (kind is not None) + [f"min_count ({min_count})"] * (min_count != 1)
    if own:
        raise ValueError(f"vocabulary_from brings kind and words; leave out {' and '.join(own)}")
    if path.is_file():
        vocabulary: Vocabulary = read_word_list(path, normalization=TOKENIZED if tokenized else PLAIN)
    else:
        vocabulary = Dataset.open(path).vocabulary
        vocabulary = vocabulary.with_normalization(TOKENIZED) if tokenized else vocabulary
    if size not in (None, vocabulary.size):
        raise ValueError(
            f"{path}: has {vocabulary.size:,} {vocabulary.kind}, special ones included, and not the {size:,} "
            "of vocabulary_size; leave that out, or give another vocabulary"
        )
    identity = hashlib.sha256(json.dumps(vocabulary.to_json()).encode()).hexdigest()
    return VocabularyChoice(identity=identity, reads_text=False, make=lambda text: vocabulary)
