"""Writes both sides of a pair in step, and counts and digests what it writes."""

from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dataset import SENTENCE_DTYPE, SplitManifest
from ..joint_subwords import JointSubwords
from ..languages import languages_of
from ..pieces import DigestedFile
from ..vocabulary import token_dtype
from .dataset import BitextManifest, SourceFile, side_name
from .filters import LengthFilter, Lengths
from .reading import Pairs

Tokens = npt.NDArray[np.int64]


class _Side:
    """The files of one language, and their counts."""

    def __init__(self, directory: Path, name: str, vocabulary: JointSubwords, stack: ExitStack) -> None:
        self._vocabulary = vocabulary
        self._dtype = token_dtype(vocabulary.size)
        self._tokens = stack.enter_context(closing(DigestedFile(directory / f"{name}.tokens")))
        self._sentences = stack.enter_context(closing(DigestedFile(directory / f"{name}.sentences")))
        self._num_tokens = self._num_sentences = self._num_words = self._num_bytes = 0

    def write(self, lines: list[str], token_N: Tokens, length_N: Lengths) -> None:
        """Some lines, their tokens one after the other, and how many each has, its end included."""
        end_N = np.cumsum(length_N) + self._num_tokens
        self._tokens.write(token_N.astype(self._dtype).tobytes())
        self._sentences.write(end_N.astype(SENTENCE_DTYPE).tobytes())
        self._num_tokens += len(token_N)
        self._num_sentences += len(lines)
        self._num_words += self._vocabulary.normalization.count_words(lines)
        self._num_bytes += sum(len(line.encode()) for line in lines) + len(lines)

    def manifest(self) -> SplitManifest:
        """What was written, once it is on the disk. Sources are those of the pair."""
        self._tokens.bring_to_disk()
        self._sentences.bring_to_disk()
        return SplitManifest(
            tokens=self._num_tokens,
            sentences=self._num_sentences,
            words=self._num_words,
            bytes=self._num_bytes,
            dtype=self._dtype.str,
            tokens_sha256=self._tokens.sha256,
            sentences_sha256=self._sentences.sha256,
            sources=[],
        )


def write_bitext(
    directory: Path,
    part: str,
    pair: str,
    batches: Iterable[Pairs],
    *,
    vocabulary: JointSubwords,
    keep: LengthFilter | None,
    sources: list[SourceFile],
) -> BitextManifest:
    """Write what `keep` (None: everything) leaves of the `batches` of clean lines. ValueError if none is."""
    left_out: dict[str, int] = {}
    num_kept = 0
    with ExitStack() as stack:
        sides = [
            _Side(directory, side_name(part, pair, language), vocabulary, stack)
            for language in languages_of(pair)
        ]
        for pairs in batches:
            num_kept += _write(pairs, sides, vocabulary, keep, left_out)
        if num_kept == 0:
            names = ", ".join(source.name for source in sources[:3])
            counts = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items() if number)
            cure = "give more text, other filters, or hold out another share"
            raise ValueError(f"{part}, {pair}: no pair of {names} is left ({counts or 'none read'}); {cure}")
        first, second = (side.manifest() for side in sides)
    return BitextManifest(first=first, second=second, left_out=left_out, sources=sources)


def _write(
    pairs: Pairs,
    sides: list[_Side],
    vocabulary: JointSubwords,
    keep: LengthFilter | None,
    left_out: dict[str, int],
) -> int:
    """Write a batch of pairs, and return how many were kept; the others are counted in `left_out`."""
    both_lines = [list(lines) for lines in zip(*pairs, strict=True)] or [[], []]
    both_tokens = [vocabulary.encode_lines(lines) for lines in both_lines]
    both_lengths = [_lengths(token_N, vocabulary.end_id) for token_N in both_tokens]
    kept_N = _kept(keep, both_lengths, left_out)
    for side, lines, token_N, length_N in zip(sides, both_lines, both_tokens, both_lengths, strict=True):
        kept_lines = [line for line, kept in zip(lines, kept_N, strict=True) if kept]
        side.write(kept_lines, token_N[np.repeat(kept_N, length_N)], length_N[kept_N])
    return int(kept_N.sum())


def _lengths(token_N: Tokens, end_id: int) -> Lengths:
    """How many tokens each sentence has, its end included."""
    return np.diff(np.flatnonzero(token_N == end_id), prepend=-1)


def _kept(
    keep: LengthFilter | None, both_lengths: list[Lengths], left_out: dict[str, int]
) -> npt.NDArray[Any]:
    """Which pairs are taken; those that are not are counted in `left_out`."""
    first_N, second_N = (length_N - 1 for length_N in both_lengths)
    kept_N = np.ones(len(first_N), dtype=bool)
    if keep is not None:
        for reason, refused_N in keep.reasons(first_N, second_N).items():
            left_out[reason] = left_out.get(reason, 0) + int(refused_N.sum())
            kept_N &= ~refused_N
    return kept_N
