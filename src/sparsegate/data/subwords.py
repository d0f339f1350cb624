"""Vocabularies in which nothing is unknown: byte-level subwords, and plain bytes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .normalization import Normalization, normalize
from .vocabulary import Vocabulary, check_ids, check_lines

NUM_BYTES = 256
MAX_WORD_BYTES = 128


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes in byte-level BPE, in code point order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_of(letter: str) -> int:
    """The byte that a character of the `byte_alphabet` stands for: itself if it is printable, else it is one
    of the characters from 256 on, in the order of the others."""
    return ord(letter) if ord(letter) < NUM_BYTES else _UNPRINTABLE[ord(letter) - NUM_BYTES]


_UNPRINTABLE = sorted({*range(NUM_BYTES)} - set(map(ord, byte_alphabet())))


def piece_ids(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The 256 bytes and what `merges` make of them, numbered. ValueError for what no training gives."""
    pieces = {piece: token for token, piece in enumerate(byte_alphabet())}
    for left, right in merges:
        if left not in pieces or right not in pieces:
            raise ValueError(
                f"merges: {left[:40]!r} + {right[:40]!r} joins a piece that no earlier merge makes"
            )
        pieces.setdefault(left + right, len(pieces))
    if len(set(merges)) != len(merges):
        raise ValueError("merges: the same merge stands in it twice")
    return pieces


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges that a byte-pair tokenizer has learned, in order."""
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


class SubwordVocabulary(Vocabulary):
    """Byte-level byte-pair encoding (by the ``tokenizers`` library), lossless for every line in NFC.

    Ids are the 256 bytes, then what the `merges` make, then the end of a sentence. The end is not a piece of
    the tokenizer, so that no text, ``</s>`` included, encodes to it.
    """

    kind: ClassVar[str] = "subwords"

    def __init__(self, *, merges: Sequence[tuple[str, str]], normalization: Normalization) -> None:
        pieces = piece_ids(merges)
        self._merges = list(merges)
        self._normalization = normalization
        self._num_pieces = len(pieces)
        self._tokenizer = _byte_level(models.BPE(vocab=pieces, merges=self._merges))

    @classmethod
    def train(cls, batches: Iterable[Sequence[str]], *, size: int, normalization: Normalization) -> Self:
        """Learn the merges from batches of lines; `size` counts the 256 bytes and the end of a sentence."""
        if size <= NUM_BYTES + 1:
            raise ValueError(
                f"vocabulary_size ({size}) must exceed {NUM_BYTES + 1}: the bytes and the end of a line"
            )
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1, min_frequency=2, show_progress=False, initial_alphabet=byte_alphabet()
        )
        tokenizer.train_from_iterator(_normalized(batches), trainer)
        return cls(merges=merges_of(tokenizer), normalization=normalization)

    @property
    def size(self) -> int:
        return self._num_pieces + 1

    @property
    def end_id(self) -> int:
        return self._num_pieces

    @property
    def unknown_id(self) -> None:
        return None

    @property
    def normalization(self) -> Normalization:
        return self._normalization

    def with_normalization(self, normalization: Normalization) -> "SubwordVocabulary":
        return SubwordVocabulary(merges=self._merges, normalization=normalization)

    def encode_lines(self, lines: Sequence[str]) -> npt.NDArray[np.int64]:
        check_lines(lines)
        encodings = self._tokenizer.encode_batch_fast([normalize(line) for line in lines])
        ids: list[int] = []
        for encoding in encodings:
            ids.extend(encoding.ids)
            ids.append(self.end_id)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        lines: list[list[int]] = [[]]
        for token in check_ids(ids, self.size):
            if token == self.end_id:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self._tokenizer.decode_batch(lines, skip_special_tokens=False))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": self.kind,
            "normalization": self._normalization.name,
            "merges": [list(merge) for merge in self._merges],
        }


class ByteVocabulary(Vocabulary):
    """The 256 bytes of UTF-8; byte 10, the line feed, which no line contains, is the end of a sentence."""

    kind: ClassVar[str] = "bytes"

    def __init__(self, *, normalization: Normalization) -> None:
        self._normalization = normalization

    @property
    def size(self) -> int:
        return NUM_BYTES

    @property
    def end_id(self) -> int:
        return ord("\n")

    @property
    def unknown_id(self) -> None:
        return None

    @property
    def normalization(self) -> Normalization:
        return self._normalization

    def with_normalization(self, normalization: Normalization) -> "ByteVocabulary":
        return ByteVocabulary(normalization=normalization)

    def encode_lines(self, lines: Sequence[str]) -> npt.NDArray[np.uint8]:
        check_lines(lines)
        return np.frombuffer(normalize("\n".join((*lines, ""))).encode(), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return bytes(check_ids(ids, self.size)).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, "kind": self.kind, "normalization": self._normalization.name}


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # The time to learn from a word grows with the square of its length: one of a megabyte would take minutes.
    pieces = pre_tokenizers.FixedLength(length=MAX_WORD_BYTES)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _normalized(batches: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    for lines in batches:
        yield [normalize(line) for line in lines]
