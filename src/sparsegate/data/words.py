"""Vocabularies of whole words and of single characters, with the counts seen in training."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from .normalization import Normalization, normalize
from .vocabulary import END, UNKNOWN, Vocabulary, check_ids, check_lines

END_ID = 0
UNKNOWN_ID = 1
MAX_WORD_LENGTH = 128
_LINE_END = ("\n",)


def most_common(count: Mapping[str, int], *, size: int | None, min_count: int) -> list[str]:
    """The entries of `count` that it has at least `min_count` times, by falling count, then code point: at
    most `size` with both specials."""
    frequent = [entry for entry, number in count.items() if number >= min_count]
    ordered = sorted(frequent, key=lambda entry: (-count[entry], entry))
    return ordered if size is None else ordered[: size - 2]


class WordVocabulary(Vocabulary):
    """Words by falling count after ``</s>`` (id 0) and ``<unk>`` (id 1).

    `words` and `counts` (how often each stood in the training text, 0 where that is not known) run over all
    ids. Words of more than 128
    characters are always unknown. Decoding joins words with a space, which is not how they were spaced in
    plain text.
    """

    kind: ClassVar[str] = "words"
    tokens_are_words: ClassVar[bool] = True

    def __init__(self, *, words: Sequence[str], counts: Sequence[int], normalization: Normalization) -> None:
        self._words = check_entries("words", words, counts)
        self._counts = list(counts)
        self._normalization = normalization
        for word in self._words[2:]:
            if word.split() != [word] or len(word) > MAX_WORD_LENGTH:
                raise ValueError(
                    f"words: {word[:40]!r} is not one word of at most {MAX_WORD_LENGTH} characters"
                )
        self._id_of = {word: token for token, word in enumerate(self._words)}
        # The end of a sentence is looked up as a line feed; as a word of the text it is like any unknown.
        self._id_of[END] = UNKNOWN_ID
        self._id_of["\n"] = END_ID

    @classmethod
    def from_counts(
        cls, count: Mapping[str, int], *, size: int | None, min_count: int, normalization: Normalization
    ) -> Self:
        """The `size` most frequent words (None: all of them) of those that occur at least `min_count` times.

        `count` counts line ends as ``"\\n"``.
        """
        known = {
            word: number
            for word, number in count.items()
            if word not in ("\n", END, UNKNOWN) and len(word) <= MAX_WORD_LENGTH
        }
        words = most_common(known, size=size, min_count=min_count)
        ends = count.get("\n", 0)
        kept = [known[word] for word in words]
        unknown = sum(count.values()) - ends - sum(kept)
        return cls(words=[END, UNKNOWN, *words], counts=[ends, unknown, *kept], normalization=normalization)

    @property
    def size(self) -> int:
        return len(self._words)

    @property
    def end_id(self) -> int:
        return END_ID

    @property
    def unknown_id(self) -> int:
        return UNKNOWN_ID

    @property
    def counts(self) -> list[int]:
        """How often each id stood in the training text."""
        return list(self._counts)

    @property
    def normalization(self) -> Normalization:
        return self._normalization

    def with_normalization(self, normalization: Normalization) -> "WordVocabulary":
        return WordVocabulary(words=self._words, counts=self._counts, normalization=normalization)

    def encode_lines(self, lines: Sequence[str]) -> npt.NDArray[np.int64]:
        check_lines(lines)
        # In one stream, so that each word is looked up while it is still in the processor's cache.
        ended = zip(map(self._normalization.split, map(normalize, lines)), repeat(_LINE_END))
        words = chain.from_iterable(chain.from_iterable(ended))
        return np.fromiter(map(self._id_of.get, words, repeat(UNKNOWN_ID)), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        words = [self._words[token] if token != END_ID else "\n" for token in check_ids(ids, self.size)]
        return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": self.kind,
            "normalization": self._normalization.name,
            "words": self._words,
            "counts": self._counts,
        }


class CharacterVocabulary(Vocabulary):
    """Characters (code points in NFC) by falling count after ``</s>`` (id 0) and ``<unk>`` (id 1)."""

    kind: ClassVar[str] = "characters"

    def __init__(
        self, *, characters: Sequence[str], counts: Sequence[int], normalization: Normalization
    ) -> None:
        self._characters = check_entries("characters", characters, counts)
        self._counts = list(counts)
        self._normalization = normalization
        for character in self._characters[2:]:
            if len(character) != 1 or character == "\n":
                raise ValueError(f"characters: {character[:40]!r} is not one character of a line")
        code_points = [ord(character) for character in self._characters[2:]]
        self._id_of_code_point = np.full(max(code_points, default=0) + 11, UNKNOWN_ID, dtype=np.uint32)
        self._id_of_code_point[code_points] = np.arange(2, self.size)
        self._id_of_code_point[ord("\n")] = END_ID

    @classmethod
    def from_counts(
        cls, count: Mapping[str, int], *, size: int | None, min_count: int, normalization: Normalization
    ) -> Self:
        """The `size` most frequent characters (None: all of them) of those that occur at least `min_count`
        times. `count` counts line ends as ``"\\n"``."""
        known = {character: number for character, number in count.items() if character != "\n"}
        characters = most_common(known, size=size, min_count=min_count)
        kept = [known[character] for character in characters]
        counts = [count.get("\n", 0), sum(known.values()) - sum(kept), *kept]
        return cls(characters=[END, UNKNOWN, *characters], counts=counts, normalization=normalization)

    @property
    def size(self) -> int:
        return len(self._characters)

    @property
    def end_id(self) -> int:
        return END_ID

    @property
    def unknown_id(self) -> int:
        return UNKNOWN_ID

    @property
    def normalization(self) -> Normalization:
        return self._normalization

    def with_normalization(self, normalization: Normalization) -> "CharacterVocabulary":
        return CharacterVocabulary(
            characters=self._characters, counts=self._counts, normalization=normalization
        )

    def encode_lines(self, lines: Sequence[str]) -> npt.NDArray[np.uint32]:
        check_lines(lines)
        text = normalize("\n".join((*lines, "")))
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        table = self._id_of_code_point
        return np.where(code_points < len(table), table[np.minimum(code_points, len(table) - 1)], UNKNOWN_ID)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(
            self._characters[token] if token != END_ID else "\n" for token in check_ids(ids, self.size)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": self.kind,
            "normalization": self._normalization.name,
            "characters": self._characters,
            "counts": self._counts,
        }


def check_entries(field: str, entries: Sequence[str], counts: Sequence[int]) -> list[str]:
    """`entries` as a list, if they begin with the specials, are all different and have one count each."""
    if list(entries[:2]) != [END, UNKNOWN]:
        raise ValueError(f"{field}: must begin with {END} and {UNKNOWN}, not with {list(entries[:2])}")
    if len(counts) != len(entries):
        raise ValueError(f"counts: {len(counts):,} for {len(entries):,} {field}; there must be one for each")
    if len(set(entries)) != len(entries):
        entry, times = Counter(entries).most_common(1)[0]
        raise ValueError(f"{field}: {entry!r} stands in it {times} times")
    return list(entries)
