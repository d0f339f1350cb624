"""One table of subwords for all languages of a translation model, lossless for every line."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .languages import check_language
from .normalization import PLAIN, Normalization
from .subwords import MAX_WORD_BYTES, byte_alphabet, byte_of, merges_of, piece_ids
from .vocabulary import END, Vocabulary, check_ids, check_lines

PAD_ID, BEGIN_ID, END_ID = 0, 1, 2
_NUM_SPECIAL = 3

# Pieces never cross these. Letters with their marks and the space before them, as in SentencePiece, so that a
# word is the same at the beginning of a line as within it; digits one by one, so that numbers are spelled and
# not learned by heart; runs of other characters; white space.
_WORD = r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"


class JointSubwords(Vocabulary):
    """Byte-level byte-pair encoding (by the ``tokenizers`` library) that decodes to the very line encoded.

    Ids are the padding (0), the beginning (1) and the end (2) of a sentence, one token for each language to
    translate into, such as ``<2fr>``, then the 256 bytes, then what the `merges` make of them. Nothing is
    unknown, and no text encodes to an id that is not a piece. Nothing is normalised either: bring text into
    its usual form with `cleaning.clean_line` before.

    A space is put before each line and taken away again when ids are decoded.
    """

    kind: ClassVar[str] = "joint_subwords"

    def __init__(
        self,
        *,
        merges: Sequence[tuple[str, str]],
        languages: Sequence[str],
        normalization: Normalization = PLAIN,
    ) -> None:
        if list(languages) != sorted(set(languages)) or not languages:
            raise ValueError(f"languages ({', '.join(languages)}) must be in order, and each one once")
        for language in languages:
            check_language(language)
        pieces = piece_ids(merges)
        self._merges = list(merges)
        self._languages = tuple(languages)
        self._normalization = normalization
        self._first_piece = _NUM_SPECIAL + len(self._languages)
        self._size = self._first_piece + len(pieces)
        self._tokenizer = _pipeline(models.BPE(vocab=pieces, merges=self._merges))

    @classmethod
    def train(cls, batches: Iterable[Sequence[str]], *, size: int, languages: Sequence[str]) -> Self:
        """Learn the merges from lines of all languages; `size` counts every id."""
        smallest = smallest_size(len(languages))
        if not smallest <= size < 1 << 31:
            raise ValueError(
                f"vocabulary_size ({size}) must be at least {smallest}: the bytes, the special tokens and "
                "one piece; and less than 2^31"
            )
        tokenizer = _pipeline(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size - _NUM_SPECIAL - len(languages),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=byte_alphabet(),
        )
        tokenizer.train_from_iterator(_checked(batches), trainer)
        return cls(merges=merges_of(tokenizer), languages=sorted(languages))

    @property
    def size(self) -> int:
        return self._size

    @property
    def pad_id(self) -> int:
        """Fills rows up to the longest; never part of a sentence."""
        return PAD_ID

    @property
    def begin_id(self) -> int:
        """The first input of the decoder."""
        return BEGIN_ID

    @property
    def end_id(self) -> int:
        return END_ID

    @property
    def unknown_id(self) -> None:
        return None

    @property
    def languages(self) -> tuple[str, ...]:
        """All that can be translated into, in alphabetical order."""
        return self._languages

    def language_id(self, language: str) -> int:
        """The token that stands first in a source and names the language to translate it into.

        ValueError that names the languages there are.
        """
        if language not in self._languages:
            raise ValueError(
                f"language {language!r} is not in the vocabulary; it has {', '.join(self._languages)}"
            )
        return _NUM_SPECIAL + self._languages.index(language)

    def encode_source(self, line: str, *, target_language: str) -> list[int]:
        """What an encoder reads: the target language's token, the subwords of `line`, and the end."""
        return [self.language_id(target_language), *self.encode(line), END_ID]

    @property
    def normalization(self) -> Normalization:
        return self._normalization

    def with_normalization(self, normalization: Normalization) -> "JointSubwords":
        return JointSubwords(merges=self._merges, languages=self._languages, normalization=normalization)

    def encode_lines(self, lines: Sequence[str]) -> npt.NDArray[np.int64]:
        check_lines(lines)
        encodings = self._tokenizer.encode_batch_fast(list(lines))
        pieces: list[int] = []
        for encoding in encodings:
            pieces.extend(encoding.ids)
            pieces.append(END_ID - self._first_piece)
        return np.array(pieces, dtype=np.int64) + self._first_piece

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, `end_id` as a line feed, the other special tokens as nothing.

        Bytes that are not UTF-8, which only a model makes, become U+FFFD.
        """
        lines: list[list[int]] = [[]]
        for token in check_ids(ids, self.size):
            if token == END_ID:
                lines.append([])
            elif token >= self._first_piece:
                lines[-1].append(token - self._first_piece)
        return "\n".join(self._tokenizer.decode_batch(lines, skip_special_tokens=False))

    def names(self, ids: Iterable[int]) -> list[str]:
        """What each id is, to look at: the text of a piece with the space before it, bytes that are no
        UTF-8 by themselves as ``\\xe6``; ``<pad>``, ``<s>``, ``</s>``, ``<2fr>``."""
        special = ("<pad>", "<s>", END, *(f"<2{language}>" for language in self._languages))
        return [
            special[token] if token < self._first_piece else self._text_of(token - self._first_piece)
            for token in check_ids(ids, self.size)
        ]

    def _text_of(self, piece: int) -> str:
        letters = self._tokenizer.id_to_token(piece)
        assert letters is not None
        return bytes(map(byte_of, letters)).decode(errors="backslashreplace")

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": self.kind,
            "normalization": self._normalization.name,
            "languages": list(self._languages),
            "merges": [list(merge) for merge in self._merges],
        }

    def to_tokenizers(self) -> str:
        """The JSON that the ``tokenizers`` library reads, for other programs. Its ids are those of the pieces
        alone: counted from the first byte, without the special tokens before it."""
        return self._tokenizer.to_str()


def smallest_size(num_languages: int) -> int:
    """How many ids there are at least: special tokens, bytes, and one piece."""
    return _NUM_SPECIAL + num_languages + len(byte_alphabet()) + 1


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Prepend(" ")
    words = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The time to learn from a word grows with the square of its length, and not all scripts have spaces.
    parts = pre_tokenizers.FixedLength(length=MAX_WORD_BYTES)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes, parts])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _checked(batches: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    for lines in batches:
        check_lines(lines)
        yield list(lines)
