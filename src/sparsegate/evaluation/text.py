"""What is measured on: a split of a dataset, one half of it, or pieces of it.

Hyper-parameters chosen on one half and reported on the other need halves; pieces tell how sure a figure is. A
split is cut at the end of the sentence in which its middle token stands, so both halves are whole sentences,
and are together the split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from ..data.dataset import TokenFile
from ..data.vocabulary import Vocabulary

Part = Literal["all", "first-half", "second-half"]
PARTS: tuple[Part, ...] = get_args(Part)

_DECODED_AT_ONCE = 1 << 12


class Text(Protocol):
    """Sentences as tokens, and the counts that perplexities divide by. A `TokenFile` is one.

    end_id: follows every sentence, and is among the tokens. token_N: all tokens. sentence_end_N: for each
    sentence the position after its end. num_words: without ends. num_bytes: of UTF-8, one for each end
    included. None where the number is not known.
    """

    @property
    def end_id(self) -> int: ...
    @property
    def token_N(self) -> npt.NDArray[Any]: ...
    @property
    def sentence_end_N(self) -> npt.NDArray[Any]: ...
    @property
    def num_words(self) -> int | None: ...
    @property
    def num_bytes(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A `Text` that is a part of a split."""

    end_id: int
    token_N: npt.NDArray[Any]
    sentence_end_N: npt.NDArray[Any]
    num_words: int | None
    num_bytes: int | None


def part_of(token_file: TokenFile, vocabulary: Vocabulary, part: Part) -> Text:
    """The whole split or one half of it.

    A dataset states the words and bytes of whole splits alone; those of a half are counted from its tokens.
    This is exact where text can be had back from tokens (subwords, bytes), and for words where every token
    is one. What cannot be counted is None: the bytes of words and the words of characters, some of which
    may be unknown. Prepare the two halves as splits of their own where these are needed.

    Raises:
        ValueError: there is no such part.
    """
    if part == "all":
        return token_file
    if part not in PARTS:
        raise ValueError(f"part ({part}) must be one of {', '.join(PARTS)}")
    end_N = token_file.sentence_end_N
    cut = int(np.searchsorted(end_N, token_file.num_tokens // 2)) + 1
    sentences, offset = (slice(cut), 0) if part == "first-half" else (slice(cut, None), int(end_N[cut - 1]))
    chosen_N = end_N[sentences].astype(np.int64) - offset
    if len(chosen_N) == 0:
        raise ValueError(f"{token_file.tokens_path}: too few sentences to have a {part}; evaluate all of it")
    token_N = token_file.token_N[offset : offset + chosen_N[-1]]
    num_words, num_bytes = _count(token_file, vocabulary, token_N, chosen_N)
    return Stretch(
        end_id=token_file.end_id,
        token_N=token_N,
        sentence_end_N=chosen_N,
        num_words=num_words,
        num_bytes=num_bytes,
    )


def pieces_of(token_file: TokenFile, number: int) -> list[Text]:
    """A split in at most so many pieces of about equal numbers of tokens, each of whole sentences.

    Together they are the split. Their words and bytes are not counted.
    """
    end_N = token_file.sentence_end_N.astype(np.int64)
    targets = np.arange(1, number) * token_file.num_tokens // number
    last_N = np.unique(np.append(np.searchsorted(end_N, targets), len(end_N) - 1))
    pieces: list[Text] = []
    first, start = 0, 0
    for last in last_N:
        stop = int(end_N[last])
        pieces.append(
            Stretch(
                end_id=token_file.end_id,
                token_N=token_file.token_N[start:stop],
                sentence_end_N=end_N[first : last + 1] - start,
                num_words=None,
                num_bytes=None,
            )
        )
        first, start = int(last) + 1, stop
    return pieces


def _count(
    token_file: TokenFile, vocabulary: Vocabulary, token_N: npt.NDArray[Any], end_N: npt.NDArray[Any]
) -> tuple[int | None, int | None]:
    if vocabulary.unknown_id is None:
        return _count_by_decoding(vocabulary, token_N, end_N)
    if token_file.num_words + token_file.num_sentences == token_file.num_tokens:
        return len(token_N) - len(end_N), None
    return None, None


def _count_by_decoding(
    vocabulary: Vocabulary, token_N: npt.NDArray[Any], end_N: npt.NDArray[Any]
) -> tuple[int, int]:
    num_words = num_bytes = 0
    for start, end in _blocks(end_N):
        # The last token is the end of a sentence, which decodes to a line feed that would begin another.
        text = vocabulary.decode(token_N[start : end - 1])
        num_words += vocabulary.normalization.count_words(text.split("\n"))
        num_bytes += len(text.encode()) + 1
    return num_words, num_bytes


def _blocks(end_N: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """The first position of each block of sentences, and the one after its last."""
    start = 0
    for first in range(0, len(end_N), _DECODED_AT_ONCE):
        end = int(end_N[first : first + _DECODED_AT_ONCE][-1])
        yield start, end
        start = end
