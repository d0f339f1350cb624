"""Parallel text in, translation dataset out: complete or absent, in memory that distinct words alone grow."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..dataset import VOCABULARY, VocabularyManifest
from ..files import new_directory, refuse_existing, sealed, write_atomically
from ..joint_subwords import JointSubwords, smallest_size
from ..languages import languages_of
from ..storage import save_vocabulary
from ..text_options import TextOptions
from .cleaning import CLEANING
from .dataset import (
    MANIFEST,
    BitextManifest,
    Filters,
    HeldOutPairs,
    SourceFile,
    TranslationDataset,
    TranslationManifest,
)
from .filters import LengthFilter
from .parts import PartText, Reader, part_texts
from .source import ParallelText, check_files
from .writer import write_bitext

DEFAULT_SIZE = 1 << 15
Progress = Callable[[int, int], None]


def prepare_translation(
    *,
    output: Path,
    train: Sequence[ParallelText],
    valid: Sequence[ParallelText] = (),
    test: Sequence[ParallelText] = (),
    both_directions: bool = False,
    vocabulary_size: int | None = None,
    vocabulary_from: Path | None = None,
    filters: LengthFilter | None = None,
    valid_share: float = 0.01,
    test_share: float = 0.01,
    text: TextOptions | None = None,
    progress: Progress | None = None,
) -> TranslationDataset:
    """Make the dataset directory `output` out of parallel text (see `reading.read_pairs`), and open it.

    train, valid, test: texts of the same pair are joined in their order; none may stand in two parts. Without
        valid and test texts, `valid_share` and `test_share` of the train pairs are held out, by a hash of
        their first side, so that equal sentences are in one part, whatever they are translated to.
    both_directions: every pair is also there in the other direction; its text is stored once.
    vocabulary_size: of the joint subwords that are made from the train pairs (None: 32,768), special tokens
        included; little text gives fewer. Or `vocabulary_from`: a translation dataset whose subwords are
        taken over. Without train texts, which needs `vocabulary_from`, there is no such part.
    filters: which train pairs are taken; valid and test pairs all are.
    progress: called with the bytes of text done and the bytes to do, over all passes.

    All text is cleaned as `cleaning` says. The directory appears when it is complete. `output` must not
    exist, or be empty: FileExistsError. ValueError or OSError in one line for everything that cannot be read
    or written; then nothing is left behind.
    """
    refuse_existing(output)
    given = {"train": train, "valid": valid, "test": test}
    check_files(given)
    filters = filters or LengthFilter()
    shares = {} if valid or test or not train else _checked_shares(valid=valid_share, test=test_share)
    parts = part_texts(given, shares, both_directions=both_directions)
    learned = [] if vocabulary_from else [text for text in parts if text.part == "train"]
    make = _vocabulary_maker(vocabulary_size, vocabulary_from, _languages(parts), has_train=bool(train))
    read = Reader(passes=(*learned, *parts), options=text or TextOptions(), progress=progress)
    # A key of its own: what a killed process left is made anew, and not gone on with.
    with new_directory(output, key=secrets.token_hex(8)) as directory:
        vocabulary = make(_sides(read, learned))
        save_vocabulary(vocabulary, directory / VOCABULARY)
        bitexts: dict[str, dict[str, BitextManifest]] = {}
        for each in parts:
            bitexts.setdefault(each.part, {})[each.pair] = write_bitext(
                directory,
                each.part,
                each.pair,
                read(each),
                vocabulary=vocabulary,
                keep=filters if each.part == "train" else None,
                sources=_sources(each, parts),
            )
        manifest = TranslationManifest(
            format=1,
            cleaning=CLEANING,
            normalization=vocabulary.normalization.name,
            both_directions=both_directions,
            filters=Filters(max_subwords=filters.max_subwords, max_ratio=filters.max_ratio),
            held_out=HeldOutPairs(**shares) if shares else None,
            vocabulary=_described(vocabulary, directory / VOCABULARY),
            parts=bitexts,
        )
        write_atomically(directory / MANIFEST, sealed(manifest.model_dump()))
    return TranslationDataset.open(output)


def _checked_shares(**shares: float) -> dict[str, float]:
    for part, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{part}_share ({share}) must be at least 0 and less than 1")
    if sum(shares.values()) >= 1:
        raise ValueError(
            f"valid_share and test_share ({sum(shares.values()):g} together) must leave pairs for train"
        )
    return {part: share for part, share in shares.items() if share > 0}


def _languages(parts: Sequence[PartText]) -> list[str]:
    return sorted({language for text in parts for language in languages_of(text.pair)})


def _sides(read: Reader, learned: Sequence[PartText]) -> Iterator[list[str]]:
    """The lines of both languages of all texts that subwords are made from."""
    for text in learned:
        for pairs in read(text):
            yield [line for pair in pairs for line in pair]


def _vocabulary_maker(
    size: int | None, taken_from: Path | None, languages: Sequence[str], *, has_train: bool
) -> Callable[[Iterable[list[str]]], JointSubwords]:
    """Makes the subwords from the train part. ValueError for options that do not fit."""
    if taken_from is not None:
        if size is not None:
            raise ValueError("vocabulary_from brings its size; leave out vocabulary_size")
        old = TranslationDataset.open(taken_from).vocabulary
        for language in languages:
            old.language_id(language)
        return lambda _: old
    if not has_train:
        raise ValueError("train: no text to make subwords from; give train pairs, or vocabulary_from")
    size = DEFAULT_SIZE if size is None else size
    if size < smallest_size(len(languages)):
        smallest = smallest_size(len(languages))
        raise ValueError(f"vocabulary_size ({size}) must be at least {smallest}, such as 32768")
    return lambda batches: JointSubwords.train(batches, size=size, languages=languages)


def _sources(text: PartText, parts: Sequence[PartText]) -> list[SourceFile]:
    """The files of `text`, named from the folder that holds the files of all parts."""
    files = [file.absolute() for part in parts for each in part.texts for file in each.files]
    folder = os.path.commonpath([file.parent for file in files])
    return [
        SourceFile(
            name=file.absolute().relative_to(folder).as_posix(),
            bytes=file.stat().st_size,
            sha256=_digest(file),
            fields=_fields(each),
        )
        for each in text.texts
        for file in each.files
    ]


def _fields(text: ParallelText) -> list[str]:
    """The keys or columns of a file that holds both languages."""
    if len(text.files) == 2:
        return []
    return list(text.keys) if text.is_json else [str(column + 1) for column in text.columns]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(vocabulary: JointSubwords, path: Path) -> VocabularyManifest:
    return VocabularyManifest(
        kind=vocabulary.kind,
        size=vocabulary.size,
        fingerprint=vocabulary.fingerprint,
        file_sha256=_digest(path),
    )
