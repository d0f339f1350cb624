"""A dataset on disk: a vocabulary and memory-mapped token files with checksums.

::

    dataset.json       what is in it: counts, types, checksums, sources; carries its own checksum
    vocabulary.json
    train.tokens       little-endian uint16 or uint32 ids of all sentences, each followed by its end
    train.sentences    little-endian uint64: for each sentence the position after its end
    valid.tokens ...
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from .files import read_sealed
from .storage import load_vocabulary
from .vocabulary import Vocabulary, token_dtype

MANIFEST = "dataset.json"
VOCABULARY = "vocabulary.json"
SPLITS = ("train", "valid", "test")
SENTENCE_DTYPE = np.dtype("<u8")
_VERIFIED_AT_ONCE = 1 << 20

SplitName = Annotated[str, Field(pattern="^(train|valid|test)$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(_Part):
    """A text file that a split was made from."""

    name: str
    bytes: NonNegativeInt


class SplitManifest(_Part):
    """What is in one split. `words` leaves the ends of sentences out, `bytes` counts one for each."""

    tokens: PositiveInt
    sentences: PositiveInt
    words: NonNegativeInt
    bytes: PositiveInt
    dtype: Annotated[str, Field(pattern="^<u[24]$")]
    tokens_sha256: Sha256
    sentences_sha256: Sha256
    sources: list[Source]


class VocabularyManifest(_Part):
    """Which vocabulary the ids belong to."""

    kind: str
    size: PositiveInt
    fingerprint: Sha256
    file_sha256: Sha256


class HeldOut(_Part):
    """Which share of the train text was held out for other splits, and whether by lines or by whole files."""

    by: Literal["lines", "files"]
    valid: float = 0.0
    test: float = 0.0


class Manifest(_Part):
    """The content of ``dataset.json``."""

    format: Literal[1]
    layout: str | None = None
    normalization: str
    keep_blank_lines: bool
    held_out: HeldOut | None
    vocabulary: VocabularyManifest
    splits: Annotated[dict[SplitName, SplitManifest], Field(min_length=1)]


class TokenFile:
    """One split: its tokens and the ends of its sentences, memory-mapped read-only, and its counts.

    Every sentence is followed by `end_id`, which the counts of tokens and bytes include and `num_words` does
    not.
    """

    def __init__(self, *, directory: Path, split: str, manifest: SplitManifest, end_id: int) -> None:
        self.end_id = end_id
        self.manifest = manifest
        self.tokens_path = directory / f"{split}.tokens"
        self.sentences_path = directory / f"{split}.sentences"
        self.token_N = _map(self.tokens_path, np.dtype(manifest.dtype), manifest.tokens)
        self.sentence_end_N = _map(self.sentences_path, SENTENCE_DTYPE, manifest.sentences)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the ends of sentences included."""
        return self.manifest.tokens

    @property
    def num_sentences(self) -> int:
        """Number of sentences: lines of the text."""
        return self.manifest.sentences

    @property
    def num_words(self) -> int:
        """Number of words, without ends: a perplexity per word divides by words + sentences."""
        return self.manifest.words

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the text in NFC, one for each line end included."""
        return self.manifest.bytes

    def verify(self, *, vocabulary_size: int) -> None:
        """Read every byte; ValueError naming the file if one differs from what was written."""
        for path, digest in (
            (self.tokens_path, self.manifest.tokens_sha256),
            (self.sentences_path, self.manifest.sentences_sha256),
        ):
            _verify_digest(path, digest)
        if not self._is_consistent(vocabulary_size):
            raise ValueError(
                f"{self.tokens_path}: its tokens do not fit its sentences; prepare the dataset again"
            )

    def _is_consistent(self, vocabulary_size: int) -> bool:
        ends = 0
        for start in range(0, self.num_tokens, _VERIFIED_AT_ONCE):
            part = self.token_N[start : start + _VERIFIED_AT_ONCE]
            if int(part.max()) >= vocabulary_size:
                return False
            positions = np.flatnonzero(part == self.end_id) + start + 1
            if not np.array_equal(positions, self.sentence_end_N[ends : ends + len(positions)]):
                return False
            ends += len(positions)
        return ends == self.num_sentences and int(self.sentence_end_N[-1]) == self.num_tokens


class Dataset:
    """A directory made by `prepare`. Use `Dataset.open`."""

    def __init__(
        self, *, directory: Path, manifest: Manifest, vocabulary: Vocabulary, fingerprint: str
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.vocabulary = vocabulary
        self.fingerprint = fingerprint
        self.splits = {
            split: TokenFile(directory=directory, split=split, manifest=part, end_id=vocabulary.end_id)
            for split, part in manifest.splits.items()
        }

    @classmethod
    def open(cls, directory: Path) -> "Dataset":
        """Open the dataset and check sizes, manifest and vocabulary; `verify` checks the tokens as well.

        ValueError or FileNotFoundError in one line naming the file for what is damaged or no dataset.
        """
        path = directory / MANIFEST
        if not path.is_file():
            cure = "make one with `sparsegate prepare`"
            raise FileNotFoundError(f"{directory}: not a dataset (it has no {MANIFEST}); {cure}")
        manifest = read_sealed(path, Manifest)
        vocabulary_path = directory / VOCABULARY
        vocabulary = load_vocabulary(vocabulary_path)
        stored = (vocabulary.kind, vocabulary.size, vocabulary.fingerprint, vocabulary.normalization.name)
        listed = manifest.vocabulary
        if stored != (listed.kind, listed.size, listed.fingerprint, manifest.normalization):
            raise ValueError(f"{vocabulary_path}: not the vocabulary of {path}; prepare the dataset again")
        _verify_digest(vocabulary_path, listed.file_sha256)
        for split, part in manifest.splits.items():
            if part.dtype != token_dtype(vocabulary.size).str:
                raise ValueError(f"{path}: splits.{split}.dtype: {part.dtype} does not fit the vocabulary")
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(directory=directory, manifest=manifest, vocabulary=vocabulary, fingerprint=fingerprint)

    def split(self, name: str) -> TokenFile:
        """The split of that name; ValueError naming those that there are if it is absent."""
        if name not in self.splits:
            raise ValueError(f"{self.directory}: has no split {name!r}, but {', '.join(self.splits)}")
        return self.splits[name]

    def verify(self) -> None:
        """Read every byte of every split; ValueError naming the file if one differs from what was written."""
        for split in self.splits.values():
            split.verify(vocabulary_size=self.vocabulary.size)

    def require_vocabulary(self, vocabulary: Vocabulary) -> None:
        """ValueError unless the ids here mean what those of `vocabulary`, a run's, mean."""
        if self.vocabulary.fingerprint != vocabulary.fingerprint:
            raise ValueError(
                f"{self.directory}: made with another vocabulary ({self.vocabulary.size:,} "
                f"{self.vocabulary.kind}) than the run's ({vocabulary.size:,} {vocabulary.kind}); "
                "prepare it with the vocabulary of the run's dataset"
            )


def _map(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; prepare the dataset again")
    size, expected = path.stat().st_size, length * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes, but {expected:,} were written; prepare the dataset again")
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))


def _verify_digest(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ValueError(
            f"{path}: damaged, its sha256 is {digest} and not {expected}; prepare the dataset again"
        )
