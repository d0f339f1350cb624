"""Tokens and ends of sentences, part by part, and joined to the files of a split."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from .dataset import SENTENCE_DTYPE, Source, SplitManifest
from .normalization import normalize
from .parts import Part
from .pieces import Counts, DigestedFile, Pieces
from .storage import load_vocabulary
from .text_options import TextOptions
from .vocabulary import Vocabulary, token_dtype
from .workers import Advance, Work


def make_encoding(*, vocabulary: Path, text: TextOptions, pieces: Pieces) -> Work[Part]:
    """Encodes a part by the vocabulary of that file, each of its splits to files of its own, unless that is
    done."""
    loaded = load_vocabulary(vocabulary)

    def encode(part: Part, advance: Advance) -> None:
        if pieces.is_finished(_piece(part)):
            advance(part.num_bytes)
        else:
            _encode(part, advance, loaded, text, pieces)

    return encode


def _piece(part: Part) -> str:
    return f"tokens-{part.number:06}"


def _encode(part: Part, advance: Advance, vocabulary: Vocabulary, text: TextOptions, pieces: Pieces) -> None:
    with ExitStack() as stack:
        writers = {
            split: _SplitWriter(
                *(
                    stack.enter_context(closing(DigestedFile(pieces.path(_piece(part), f"{split}.{kind}"))))
                    for kind in ("tokens", "sentences")
                ),
                vocabulary=vocabulary,
            )
            for split in part.division.splits
        }
        for divided in part.read(options=text, advance=advance):
            for split, lines in divided.items():
                writers[split].write(lines)
    files = {f"{split}.tokens": writer.tokens for split, writer in writers.items()}
    files |= {f"{split}.sentences": writer.sentences for split, writer in writers.items()}
    pieces.finish(_piece(part), files, {split: writer.counts for split, writer in writers.items()})


class _SplitWriter:
    """Writes the tokens and sentence ends of lines, and counts what it writes."""

    def __init__(self, tokens: DigestedFile, sentences: DigestedFile, *, vocabulary: Vocabulary) -> None:
        self.tokens = tokens
        self.sentences = sentences
        self.counts = Counts()
        self._vocabulary = vocabulary
        self._dtype = token_dtype(vocabulary.size)

    def write(self, batch: Sequence[str]) -> None:
        lines = [normalize(line) for line in batch]
        token_N = self._vocabulary.encode_lines(lines)
        end_N = np.flatnonzero(token_N == self._vocabulary.end_id) + (self.counts.tokens + 1)
        assert len(end_N) == len(lines), "one end for each line"
        self.tokens.write(token_N.astype(self._dtype).tobytes())
        self.sentences.write(end_N.astype(SENTENCE_DTYPE).tobytes())
        self.counts += Counts(
            tokens=len(token_N),
            sentences=len(lines),
            words=self._num_words(lines, len(token_N)),
            bytes=len("\n".join((*lines, "")).encode()),
        )

    def _num_words(self, lines: Sequence[str], num_tokens: int) -> int:
        if self._vocabulary.tokens_are_words:
            return num_tokens - len(lines)
        return self._vocabulary.normalization.count_words(lines)


def join_split(
    directory: Path,
    split: str,
    parts: Iterable[Part],
    *,
    pieces: Pieces,
    vocabulary: Vocabulary,
    sources: list[Source],
) -> SplitManifest:
    """Join what was written of the parts to the files of the split.

    ValueError if there is no line at all, or if a file is not what was written.
    """
    total = Counts()
    with (
        closing(DigestedFile(directory / f"{split}.tokens")) as tokens,
        closing(DigestedFile(directory / f"{split}.sentences")) as sentences,
    ):
        for part in parts:
            if split not in part.division.splits:
                continue
            for content in pieces.contents(_piece(part), f"{split}.tokens"):
                tokens.write(content)
            for content in pieces.contents(_piece(part), f"{split}.sentences"):
                end_N = np.frombuffer(content, dtype=SENTENCE_DTYPE) + np.uint64(total.tokens)
                sentences.write(end_N.astype(SENTENCE_DTYPE).tobytes())
            total += pieces.record(_piece(part)).splits[split]
        tokens.bring_to_disk()
        sentences.bring_to_disk()
    if total.sentences == 0:
        names = ", ".join(source.name for source in sources[:3])
        cure = "give more text, or hold out a larger share"
        raise ValueError(f"{split}: no line for it in {names}, blank ones not counted; {cure}")
    return SplitManifest(
        **total.model_dump(),
        dtype=token_dtype(vocabulary.size).str,
        tokens_sha256=tokens.sha256,
        sentences_sha256=sentences.sha256,
        sources=sources,
    )
