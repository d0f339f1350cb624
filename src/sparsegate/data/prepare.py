"""Text in, dataset directory out: complete or absent, in constant memory but for counts of distinct words."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from .dataset import MANIFEST, VOCABULARY, Dataset, HeldOut, Manifest, Source, VocabularyManifest
from .files import new_directory, refuse_existing, sealed, write_atomically
from .hold_out import SplitText, given_splits, hold_out_files, hold_out_lines
from .normalization import PLAIN, TOKENIZED
from .storage import save_vocabulary
from .text import TextOptions, text_files
from .token_writer import write_split
from .train_vocabulary import KINDS, VocabularyKind, check_size, train_vocabulary
from .vocabulary import Vocabulary

HoldOut = Literal["lines", "files"]
Progress = Callable[[int, int], None]


def prepare(
    *,
    output: Path,
    train: Sequence[Path],
    valid: Sequence[Path] = (),
    test: Sequence[Path] = (),
    vocabulary: VocabularyKind | None = None,
    vocabulary_size: int | None = None,
    vocabulary_from: Path | None = None,
    tokenized: bool = False,
    hold_out: HoldOut = "lines",
    valid_share: float = 0.01,
    test_share: float = 0.01,
    text: TextOptions | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Make the dataset directory `output` out of text files (see `text.read_lines`), and open it.

    train, valid, test: files, or directories of files. Without valid and test files, `valid_share` and
        `test_share` of
        train are held out: of its lines or of whole files (source code), by a hash of their content. Without
        train files, which needs `vocabulary_from`, there is no such split.
    vocabulary: the kind to make from the train split, of at most `vocabulary_size` ids (None: every word or
        character; subwords need a size). Or `vocabulary_from`: a dataset whose vocabulary is taken over.
    tokenized: words are what stands between white space (``tokenized-1``); else they are split as
        `vocabulary_from` does, or by ``plain-1``.
    progress: called with the bytes of text done and the bytes to do, over all passes.

    The directory appears when it is complete. `output` must not exist, or be empty: FileExistsError.
    ValueError or OSError in one line for everything that cannot be read or written; then nothing is left
    behind.
    """
    refuse_existing(output)
    text = text or TextOptions()
    shares = {} if valid or test or not train else _checked_shares(valid=valid_share, test=test_share)
    files = {"train": text_files(train), "valid": text_files(valid), "test": text_files(test)}
    splits = _splits(files, hold_out, shares)
    make = _vocabulary_maker(vocabulary, vocabulary_size, vocabulary_from, tokenized, has_train=bool(train))
    read_first = () if vocabulary_from or vocabulary == "bytes" else splits[:1]
    read = _Reader(splits=(*read_first, *splits), text=text, progress=progress)
    with new_directory(output) as directory:
        built = make(read(splits[0]))
        save_vocabulary(built, directory / VOCABULARY)
        parts = {
            split.name: write_split(
                directory, split.name, read(split), vocabulary=built, sources=_sources(split, splits)
            )
            for split in splits
        }
        manifest = Manifest(
            format=1,
            normalization=built.normalization.name,
            keep_blank_lines=text.keep_blank_lines,
            held_out=HeldOut(by=hold_out, **shares) if shares else None,
            vocabulary=_described(built, directory / VOCABULARY),
            splits=parts,
        )
        write_atomically(directory / MANIFEST, sealed(manifest.model_dump()))
    return Dataset.open(output)


class _Reader:
    """Reads splits, and tells `progress` how many bytes of all the passes to come are done."""

    def __init__(self, *, splits: Sequence[SplitText], text: TextOptions, progress: Progress | None) -> None:
        self._text = text
        self._progress = progress
        self._done = 0
        self._total = sum(split.num_bytes for split in splits)

    def __call__(self, split: SplitText) -> Iterator[list[str]]:
        return split.read(options=self._text, advance=self._advance)

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _checked_shares(**shares: float) -> dict[str, float]:
    for split, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{split}_share ({share}) must be at least 0 and less than 1")
    if sum(shares.values()) >= 1:
        raise ValueError(
            f"valid_share and test_share ({sum(shares.values()):g} together) must leave text for train"
        )
    return {split: share for split, share in shares.items() if share > 0}


def _splits(
    files: Mapping[str, Sequence[Path]], hold_out: HoldOut, shares: Mapping[str, float]
) -> list[SplitText]:
    """The text of each split, train first. ValueError if there is none."""
    splits = given_splits(files)
    if not splits:
        raise ValueError("train: no text; give at least one file")
    if not shares:
        return splits
    match hold_out:
        case "lines":
            return hold_out_lines(files["train"], shares)
        case "files":
            return hold_out_files(files["train"], shares)
        case _:
            raise ValueError(f"hold_out ({hold_out!r}) must be 'lines' or 'files'")


def _vocabulary_maker(
    kind: VocabularyKind | None,
    size: int | None,
    taken_from: Path | None,
    tokenized: bool,
    *,
    has_train: bool,
) -> Callable[[Iterator[list[str]]], Vocabulary]:
    """Makes the vocabulary from the train split. ValueError for options that do not fit."""
    if taken_from is not None:
        if kind is not None or size is not None:
            raise ValueError("vocabulary_from brings kind and size; leave out vocabulary and vocabulary_size")
        old = Dataset.open(taken_from).vocabulary
        return lambda _: old.with_normalization(TOKENIZED) if tokenized else old
    if kind is None:
        raise ValueError(f"vocabulary: name its kind ({', '.join(KINDS)}), or give vocabulary_from")
    if not has_train:
        raise ValueError("train: no text to make a vocabulary from; give train files, or vocabulary_from")
    check_size(kind, size)
    normalization = TOKENIZED if tokenized else PLAIN
    return lambda batches: train_vocabulary(kind, batches, size=size, normalization=normalization)


def _sources(split: SplitText, splits: Sequence[SplitText]) -> list[Source]:
    """The files of `split`, named from the folder that holds the files of all splits."""
    folder = os.path.commonpath([file.absolute().parent for each in splits for file in each.files])
    return [
        Source(name=file.absolute().relative_to(folder).as_posix(), bytes=file.stat().st_size)
        for file in split.files
    ]


def _described(vocabulary: Vocabulary, path: Path) -> VocabularyManifest:
    return VocabularyManifest(
        kind=vocabulary.kind,
        size=vocabulary.size,
        fingerprint=vocabulary.fingerprint,
        file_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
