"""What a vocabulary is, and how it is stored."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .normalization import Normalization

END = "</s>"
UNKNOWN = "<unk>"

TokenIds = npt.NDArray[np.integer[Any]]


class Vocabulary(ABC):
    """Text to token ids and back. A line of text is a sentence, and `end_id` stands for its end.

    No text encodes to `end_id`. Vocabularies are immutable.
    """

    kind: ClassVar[str]
    tokens_are_words: ClassVar[bool] = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of ids, special ones included."""

    @property
    @abstractmethod
    def end_id(self) -> int:
        """Id of the end of a sentence, which is also the first input of a model: the start."""

    @property
    @abstractmethod
    def unknown_id(self) -> int | None:
        """Id of whatever is not in the vocabulary; None where nothing can be unknown."""

    @property
    @abstractmethod
    def normalization(self) -> Normalization:
        """How text is split into words, for counting them and, in a vocabulary of words, for encoding."""

    @abstractmethod
    def with_normalization(self, normalization: Normalization) -> "Vocabulary":
        """The same ids for text that is split into words in another way."""

    @abstractmethod
    def encode_lines(self, lines: Sequence[str]) -> TokenIds:
        """Ids of all lines one after the other, each followed by `end_id`: one flat integer array."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, `end_id` as a line feed. ValueError for an id outside ``range(size)``."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What ``vocabulary.json`` holds."""

    def encode(self, line: str) -> list[int]:
        """Ids of one line, without its end. ValueError if it contains a line feed."""
        if "\n" in line:
            raise ValueError(
                "encode takes one line, but the text holds a line feed; use encode_text for several lines"
            )
        return self.encode_lines([line])[:-1].tolist()

    def encode_text(self, text: str) -> list[int]:
        """Ids of several lines, `end_id` for each line feed: text to continue, not a finished sentence."""
        return self.encode_lines(text.split("\n"))[:-1].tolist()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what every id means: equal where ids mean the same, whatever the counts."""
        meaning = {
            key: value for key, value in self.to_json().items() if key not in ("counts", "normalization")
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def check_ids(ids: Iterable[int], size: int) -> list[int]:
    """`ids` as a list; ValueError for one outside ``range(size)``."""
    checked = [int(token) for token in ids]
    for token in checked:
        if not 0 <= token < size:
            raise ValueError(f"token id {token} is outside the vocabulary of {size:,}")
    return checked


def check_lines(lines: Sequence[str]) -> None:
    """ValueError for a lone surrogate, which is no text. That each line is one is our own invariant."""
    for line in lines:
        assert "\n" not in line, "a line holds a line feed"
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError as error:
                bad = f"a lone surrogate, U+{ord(line[error.start]):04X}, at character {error.start + 1}"
                raise ValueError(f"the text is not Unicode: {bad}; read it as UTF-8") from None


def token_dtype(size: int) -> np.dtype[Any]:
    """Little-endian type that ids below `size` are stored in: two bytes where they fit, else four."""
    return np.dtype("<u2") if size <= 1 << 16 else np.dtype("<u4")
