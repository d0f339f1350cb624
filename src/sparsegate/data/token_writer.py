"""Writes the files of one split, and counts and digests what it writes."""

import hashlib
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .dataset import SENTENCE_DTYPE, Source, SplitManifest
from .files import fsync, writing
from .normalization import normalize
from .vocabulary import Vocabulary, token_dtype


class DigestedFile:
    """A new file and the SHA-256 of what is written to it. OSError names the file if that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._sha256 = hashlib.sha256()

    def write(self, array: npt.NDArray[Any]) -> None:
        content = array.tobytes()
        self._sha256.update(content)
        with writing(self._path):
            self._file.write(content)

    def close(self) -> None:
        with writing(self._path):
            self._file.close()

    def bring_to_disk(self) -> None:
        self.close()
        with writing(self._path):
            fsync(self._path)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def write_split(
    directory: Path,
    split: str,
    batches: Iterable[list[str]],
    *,
    vocabulary: Vocabulary,
    sources: list[Source],
) -> SplitManifest:
    """Write the tokens and sentence ends of all `batches` of lines. ValueError if there is no line at all."""
    dtype = token_dtype(vocabulary.size)
    num_tokens = num_sentences = num_words = num_bytes = 0
    with (
        closing(DigestedFile(directory / f"{split}.tokens")) as tokens,
        closing(DigestedFile(directory / f"{split}.sentences")) as sentences,
    ):
        for batch in batches:
            lines = [normalize(line) for line in batch]
            token_N = vocabulary.encode_lines(lines)
            end_N = np.flatnonzero(token_N == vocabulary.end_id) + (num_tokens + 1)
            assert len(end_N) == len(lines), "one end for each line"
            tokens.write(token_N.astype(dtype))
            sentences.write(end_N.astype(SENTENCE_DTYPE))
            num_tokens += len(token_N)
            num_sentences += len(lines)
            if vocabulary.tokens_are_words:
                num_words += len(token_N) - len(lines)
            else:
                num_words += vocabulary.normalization.count_words(lines)
            num_bytes += sum(len(line.encode()) for line in lines) + len(lines)
        tokens.bring_to_disk()
        sentences.bring_to_disk()
    if num_sentences == 0:
        names = ", ".join(source.name for source in sources[:3])
        cure = "give more text, or hold out a larger share"
        raise ValueError(f"{split}: no line for it in {names}, blank ones not counted; {cure}")
    return SplitManifest(
        tokens=num_tokens,
        sentences=num_sentences,
        words=num_words,
        bytes=num_bytes,
        dtype=dtype.str,
        tokens_sha256=tokens.sha256,
        sentences_sha256=sentences.sha256,
        sources=sources,
    )
