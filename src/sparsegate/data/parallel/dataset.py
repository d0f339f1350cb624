"""A translation dataset on disk: joint subwords, and memory-mapped token files for both sides of each pair.

::

    translation.json              what is in it: counts, checksums, filters, sources; carries its own checksum
    vocabulary.json
    train.en-fr.en.tokens         ids of all English lines, each followed by the end of a sentence
    train.en-fr.en.sentences      for each line the position after its end
    train.en-fr.fr.tokens ...     line n of which is the translation of line n of the other

The four files of a pair are as those of `data.dataset`. Text is stored once, and may be read in both
directions.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from ..dataset import VOCABULARY, Sha256, SplitManifest, SplitName, TokenFile, VocabularyManifest
from ..files import read_sealed
from ..joint_subwords import JointSubwords
from ..languages import PAIR_PATTERN, languages_of, pair_name
from ..storage import load_vocabulary
from ..vocabulary import Vocabulary, token_dtype

MANIFEST = "translation.json"
_DECODED_AT_ONCE = 1 << 12

PairName = Annotated[str, Field(pattern=PAIR_PATTERN)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SourceFile(_Part):
    """A file that text was read from, and which of its columns or keys, if it held both languages."""

    name: str
    bytes: NonNegativeInt
    sha256: Sha256
    fields: list[str]


class BitextManifest(_Part):
    """The text of one pair in one part; `first` and `second` are the sides in the order of the pair's name.

    left_out: how many pairs were read and not taken, by reason (see `LengthFilter.reasons`).
    """

    first: SplitManifest
    second: SplitManifest
    left_out: dict[str, NonNegativeInt]
    sources: list[SourceFile]


class Filters(_Part):
    """What training pairs had to fulfil."""

    max_subwords: int
    max_ratio: float


class HeldOutPairs(_Part):
    """Which share of the train pairs was held out for other parts, by a hash of their first side."""

    valid: float = 0.0
    test: float = 0.0


class TranslationManifest(_Part):
    """The content of ``translation.json``."""

    format: Literal[1]
    cleaning: str
    normalization: str
    both_directions: bool
    filters: Filters
    held_out: HeldOutPairs | None
    vocabulary: VocabularyManifest
    parts: Annotated[
        dict[SplitName, Annotated[dict[PairName, BitextManifest], Field(min_length=1)]], Field(min_length=1)
    ]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Text of one part from one language into another; example n is line n of both sides."""

    source_language: str
    target_language: str
    source: TokenFile
    target: TokenFile

    @property
    def name(self) -> str:
        """Such as ``en-fr``."""
        return pair_name(self.source_language, self.target_language)

    @property
    def num_examples(self) -> int:
        """Number of sentences, the same on both sides."""
        return self.source.num_sentences

    def reversed(self) -> "Pair":
        """The same text in the other direction."""
        return Pair(
            source_language=self.target_language,
            target_language=self.source_language,
            source=self.target,
            target=self.source,
        )


class TranslationDataset:
    """A directory made by `prepare_translation`. Use `TranslationDataset.open`.

    `parts` holds the pairs of each part by name, with both directions where the dataset was made for both.
    """

    def __init__(
        self,
        *,
        directory: Path,
        manifest: TranslationManifest,
        vocabulary: JointSubwords,
        fingerprint: str,
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.vocabulary = vocabulary
        self.fingerprint = fingerprint
        self.parts = {part: self._pairs_of(part) for part in manifest.parts}

    @classmethod
    def open(cls, directory: Path) -> "TranslationDataset":
        """Open the dataset and check sizes, manifest and vocabulary; `verify` checks the tokens as well.

        ValueError or FileNotFoundError in one line naming the file for what is damaged or no dataset.
        """
        path = directory / MANIFEST
        if not path.is_file():
            cure = "make one with `sparsegate prepare --pair`"
            raise FileNotFoundError(f"{directory}: not a translation dataset (it has no {MANIFEST}); {cure}")
        manifest = read_sealed(path, TranslationManifest)
        vocabulary = _vocabulary_of(directory / VOCABULARY, manifest)
        _check_sides(path, manifest, vocabulary)
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(directory=directory, manifest=manifest, vocabulary=vocabulary, fingerprint=fingerprint)

    def part(self, name: str) -> dict[str, Pair]:
        """The pairs of that part by name; ValueError naming the parts that there are if it is absent."""
        if name not in self.parts:
            raise ValueError(f"{self.directory}: has no part {name!r}, but {', '.join(self.parts)}")
        return self.parts[name]

    def pair(self, part: str, name: str) -> Pair:
        """One pair of one part; ValueError naming those that there are if it is absent."""
        pairs = self.part(part)
        if name not in pairs:
            raise ValueError(f"{self.directory}: {part} has no pair {name!r}, but {', '.join(pairs)}")
        return pairs[name]

    def lines(self, side: TokenFile) -> Iterator[str]:
        """The text of one side of a pair, line by line, as it was after cleaning."""
        start = 0
        for first in range(0, side.num_sentences, _DECODED_AT_ONCE):
            end = int(side.sentence_end_N[first : first + _DECODED_AT_ONCE][-1])
            yield from self.vocabulary.decode(side.token_N[start : end - 1]).split("\n")
            start = end

    def verify(self) -> None:
        """Read every byte of every part; ValueError naming the file if one differs from what was written."""
        for pairs in self.parts.values():
            for pair in pairs.values():
                for side in (pair.source, pair.target):
                    side.verify(vocabulary_size=self.vocabulary.size)

    def require_vocabulary(self, vocabulary: Vocabulary) -> None:
        """ValueError unless the ids here mean what those of `vocabulary`, a run's, mean."""
        if self.vocabulary.fingerprint != vocabulary.fingerprint:
            raise ValueError(
                f"{self.directory}: made with other subwords ({self.vocabulary.size:,}) than the run's "
                f"({vocabulary.size:,} {vocabulary.kind}); prepare it with those of the run's dataset"
            )

    def _pairs_of(self, part: str) -> dict[str, Pair]:
        pairs = {}
        for name, bitext in self.manifest.parts[part].items():
            languages = languages_of(name)
            first, second = (
                TokenFile(
                    directory=self.directory,
                    split=side_name(part, name, language),
                    manifest=side,
                    end_id=self.vocabulary.end_id,
                )
                for language, side in zip(languages, (bitext.first, bitext.second), strict=True)
            )
            pair = Pair(
                source_language=languages[0], target_language=languages[1], source=first, target=second
            )
            both = (pair, pair.reversed()) if self.manifest.both_directions else (pair,)
            pairs |= {direction.name: direction for direction in both}
        return pairs


def side_name(part: str, pair: str, language: str) -> str:
    """What the names of the files of one side begin with: ``train.en-fr.en``."""
    return f"{part}.{pair}.{language}"


def _check_sides(path: Path, manifest: TranslationManifest, vocabulary: JointSubwords) -> None:
    """ValueError unless the pairs of a manifest fit one another and the vocabulary."""
    cure = "prepare the dataset again"
    for part, bitexts in manifest.parts.items():
        for name, bitext in bitexts.items():
            where = f"parts.{part}.{name}"
            first, second = languages_of(name)
            if bitext.first.sentences != bitext.second.sentences:
                raise ValueError(f"{path}: {where}: its sides are not of equal length; {cure}")
            if manifest.both_directions and pair_name(second, first) in bitexts:
                raise ValueError(f"{path}: {name} and {second}-{first} are in both directions; {cure}")
            for field, side in (("first", bitext.first), ("second", bitext.second)):
                if side.dtype != token_dtype(vocabulary.size).str:
                    raise ValueError(
                        f"{path}: {where}.{field}.dtype: {side.dtype} does not fit the vocabulary"
                    )


def _vocabulary_of(path: Path, manifest: TranslationManifest) -> JointSubwords:
    vocabulary = load_vocabulary(path)
    stored = (vocabulary.kind, vocabulary.size, vocabulary.fingerprint, vocabulary.normalization.name)
    listed = manifest.vocabulary
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if (*stored, digest) != (
        *(listed.kind, listed.size, listed.fingerprint, manifest.normalization),
        listed.file_sha256,
    ):
        raise ValueError(f"{path}: not the vocabulary of {path.parent / MANIFEST}; prepare the dataset again")
    if not isinstance(vocabulary, JointSubwords):
        raise ValueError(f"{path}: {vocabulary.kind}, but translation needs {JointSubwords.kind}")
    known = set(vocabulary.languages)
    for bitexts in manifest.parts.values():
        for name in bitexts:
            if not known.issuperset(languages_of(name)):
                raise ValueError(f"{path}: has not both languages of {name}; prepare the dataset again")
    return vocabulary
