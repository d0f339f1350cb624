"""``vocabulary.json``: strict loading of every kind of vocabulary."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, RootModel

from .files import read_sealed, sealed, write_atomically
from .joint_subwords import JointSubwords
from .normalization import normalization_named
from .subwords import ByteVocabulary, SubwordVocabulary
from .vocabulary import Vocabulary
from .words import CharacterVocabulary, WordVocabulary

_Merge = Annotated[list[str], Field(min_length=2, max_length=2)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1]
    normalization: str


class _Words(_File):
    kind: Literal["words"]
    words: list[str]
    counts: list[NonNegativeInt]

    def build(self) -> Vocabulary:
        normalization = normalization_named(self.normalization)
        return WordVocabulary(words=self.words, counts=self.counts, normalization=normalization)


class _Characters(_File):
    kind: Literal["characters"]
    characters: list[str]
    counts: list[NonNegativeInt]

    def build(self) -> Vocabulary:
        normalization = normalization_named(self.normalization)
        return CharacterVocabulary(
            characters=self.characters, counts=self.counts, normalization=normalization
        )


class _Subwords(_File):
    kind: Literal["subwords"]
    merges: list[_Merge]

    def build(self) -> Vocabulary:
        merges = [(left, right) for left, right in self.merges]
        return SubwordVocabulary(merges=merges, normalization=normalization_named(self.normalization))


class _Bytes(_File):
    kind: Literal["bytes"]

    def build(self) -> Vocabulary:
        return ByteVocabulary(normalization=normalization_named(self.normalization))


class _JointSubwords(_File):
    kind: Literal["joint_subwords"]
    languages: list[str]
    merges: list[_Merge]

    def build(self) -> Vocabulary:
        return JointSubwords(
            merges=[(left, right) for left, right in self.merges],
            languages=self.languages,
            normalization=normalization_named(self.normalization),
        )


_Kinds = _Words | _Characters | _Subwords | _Bytes | _JointSubwords


class _VocabularyFile(RootModel[_Kinds]):
    root: Annotated[_Kinds, Field(discriminator="kind")]


def save_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """Write `vocabulary` to `path` atomically; it carries its own SHA-256."""
    write_atomically(path, sealed(vocabulary.to_json()))


def load_vocabulary(path: Path) -> Vocabulary:
    """Read what `save_vocabulary` wrote. ValueError naming the file if anything in it differs."""
    stored = read_sealed(path, _VocabularyFile)
    try:
        return stored.root.build()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
