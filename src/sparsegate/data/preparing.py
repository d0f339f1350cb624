"""Text in, dataset directory out: complete or absent, in constant memory but for counts of distinct words.

The text is cut into parts, which several processes count and then encode. Each finished part is kept with its
checksum in a folder beside the dataset, so that what was killed goes on there, and the parts are joined in
order: the bytes of the dataset depend on the text and the options alone.
"""

import hashlib
import json
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .corpus import Corpus, HoldOut, corpus_of
from .counting import make_counting, merged_counts
from .dataset import MANIFEST, VOCABULARY, Dataset, Manifest, SplitManifest, VocabularyManifest
from .files import TEMPORARY, new_directory, refuse_existing, sealed, write_atomically
from .normalization import Normalization
from .parts import PART_BYTES, Part, parts_of
from .pieces import Pieces
from .storage import load_vocabulary, save_vocabulary
from .text_options import TextOptions
from .token_writer import join_split, make_encoding
from .train_vocabulary import CountedKind, VocabularyKind
from .vocabulary import Vocabulary
from .vocabulary_choice import VocabularyChoice, made, taken_over
from .workers import Work, run_all

Progress = Callable[[int, int], None]
_PIECES = "pieces"
_PIECES_FORMAT = 2


def prepare(
    *,
    output: Path,
    train: Sequence[Path],
    valid: Sequence[Path] = (),
    test: Sequence[Path] = (),
    vocabulary: VocabularyKind | None = None,
    vocabulary_size: int | None = None,
    min_count: int = 1,
    vocabulary_from: Path | None = None,
    tokenized: bool = False,
    hold_out: HoldOut = "lines",
    valid_share: float = 0.01,
    test_share: float = 0.01,
    text: TextOptions | None = None,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
    progress: Progress | None = None,
) -> Dataset:
    """Make the dataset directory `output` out of text files (see `text.read_lines`), and open it.

    train, valid, test: files, or directories of files. A directory alone that has a well-known layout (see
        `layouts.layout_of`) brings all three; a split that is given as well replaces that of the layout.
        Without valid and test files, `valid_share` and `test_share` of train are held out: of its lines or of
        whole files (source code), by a hash of their content. Without train files, which needs
        `vocabulary_from`, there is no such split.
    vocabulary: the kind to make from the train split, of at most `vocabulary_size` ids (None: every word or
        character; subwords need a size), of words or characters that occur at least `min_count` times.
    vocabulary_from: a dataset, or a file with a word a line, whose vocabulary is taken over; it must have
        `vocabulary_size` ids, where that is given.
    tokenized: words are what stands between white space (``tokenized-1``); else they are split as the dataset
        of `vocabulary_from` does, or by ``plain-1``.
    workers, part_bytes: how many processes read, and how much at once. Neither changes the result.
    progress: called with the bytes of text done and the bytes to do, over all passes.

    The directory appears when it is complete. `output` must not exist, or be empty: FileExistsError.
    ValueError or OSError in one line for everything that cannot be read or written; then nothing is left
    behind. What was killed or interrupted is taken up by the next call with the same arguments and files; it
    takes about the room of the dataset, which is freed when that is done, or by a call with other arguments.
    """
    refuse_existing(output)
    if workers < 1:
        raise ValueError(f"workers ({workers}) must be at least 1")
    corpus = corpus_of(
        {"train": train, "valid": valid, "test": test},
        hold_out=hold_out,
        shares={"valid": valid_share, "test": test_share},
        options=text or TextOptions(),
        tokenized=tokenized,
    )
    choice = _vocabulary_choice(
        corpus, vocabulary_from, kind=vocabulary, size=vocabulary_size, min_count=min_count
    )
    parts = parts_of(corpus.texts, part_bytes=part_bytes)
    with new_directory(output, key=_key(corpus, choice, part_bytes)) as directory:
        if not (directory / MANIFEST).is_file():
            making = _Making(directory, corpus, parts, choice, workers=workers, progress=progress)
            built = making.vocabulary()
            splits = making.splits(built)
            manifest = Manifest(
                format=1,
                layout=corpus.layout,
                normalization=built.normalization.name,
                keep_blank_lines=corpus.options.keep_blank_lines,
                held_out=corpus.held_out,
                vocabulary=_described(built, directory / VOCABULARY),
                splits=splits,
            )
            write_atomically(directory / MANIFEST, sealed(manifest.model_dump()))
        shutil.rmtree(directory / _PIECES, ignore_errors=True)
    return Dataset.open(output)


def _vocabulary_choice(
    corpus: Corpus,
    taken_from: Path | None,
    *,
    kind: VocabularyKind | None,
    size: int | None,
    min_count: int,
) -> VocabularyChoice:
    if taken_from is not None:
        return taken_over(taken_from, kind=kind, size=size, min_count=min_count, tokenized=corpus.tokenized)
    return made(
        kind=kind,
        size=size,
        min_count=min_count,
        tokenized=corpus.tokenized,
        has_train="train" in corpus.splits,
    )


def _key(corpus: Corpus, choice: VocabularyChoice, part_bytes: int) -> str:
    """Differs wherever the pieces would, as far as the names, sizes and times of the files tell."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in corpus.files]
    divisions = [(len(text.files), asdict(text.division)) for text in corpus.texts]
    what = [_PIECES_FORMAT, unicodedata.unidata_version, part_bytes, choice.identity, files, divisions]
    held_out = corpus.held_out and corpus.held_out.model_dump()
    text = json.dumps([*what, asdict(corpus.options), corpus.layout, held_out])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Making:
    """Makes the files of a dataset in a directory, where some of it may be done already."""

    def __init__(
        self,
        directory: Path,
        corpus: Corpus,
        parts: Sequence[Part],
        choice: VocabularyChoice,
        *,
        workers: int,
        progress: Progress | None,
    ) -> None:
        self._directory = directory
        self._corpus = corpus
        self._parts = parts
        self._choice = choice
        self._workers = workers
        self._pieces = Pieces(directory / _PIECES)
        self._train_parts = [part for part in parts if "train" in part.division.splits]
        self._progress = progress
        self._done = 0
        read = [*parts, *(self._train_parts if choice.reads_text else [])]
        self._total = sum(part.num_bytes for part in read)
        (directory / _PIECES).mkdir(exist_ok=True)
        for unfinished in directory.glob(f"{TEMPORARY}*"):
            unfinished.unlink()

    def vocabulary(self) -> Vocabulary:
        """The vocabulary, which then stands in the directory."""
        path = self._directory / VOCABULARY
        if path.is_file():
            if self._choice.reads_text:
                self._advance(sum(part.num_bytes for part in self._train_parts))
            return load_vocabulary(path)
        vocabulary = self._choice.make(self)
        save_vocabulary(vocabulary, path)
        return vocabulary

    def count(self, kind: CountedKind, normalization: Normalization) -> Counter[str]:
        """How often each entry stands in the train split; see `vocabulary_choice.TrainText`."""
        options = {"kind": kind, "normalization": normalization, "text": self._corpus.options}
        self._run(partial(make_counting, **options, pieces=self._pieces), self._train_parts)
        return merged_counts(self._pieces, self._train_parts)

    def lines(self) -> Iterator[list[str]]:
        """The train split; see `vocabulary_choice.TrainText`."""
        for part in self._train_parts:
            for divided in part.read(options=self._corpus.options, advance=self._advance):
                yield divided["train"]

    def splits(self, vocabulary: Vocabulary) -> dict[str, SplitManifest]:
        """The files of all splits, which then stand in the directory."""
        make_work = partial(
            make_encoding,
            vocabulary=self._directory / VOCABULARY,
            text=self._corpus.options,
            pieces=self._pieces,
        )
        self._run(make_work, self._parts)
        return {
            split: join_split(
                self._directory,
                split,
                self._parts,
                pieces=self._pieces,
                vocabulary=vocabulary,
                sources=self._corpus.sources(split),
            )
            for split in self._corpus.splits
        }

    def _run(self, make_work: Callable[[], Work[Part]], parts: Sequence[Part]) -> None:
        run_all(parts, make_work=make_work, workers=self._workers, advance=self._advance)

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _described(vocabulary: Vocabulary, path: Path) -> VocabularyManifest:
    return VocabularyManifest(
        kind=vocabulary.kind,
        size=vocabulary.size,
        fingerprint=vocabulary.fingerprint,
        file_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
