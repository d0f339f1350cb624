"""From lines of text to lines of text: what stands between a translation model and its users."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..data.joint_subwords import JointSubwords
from ..data.parallel.cleaning import clean_line, one_line
from ..models.translation import TranslationModel
from .target import Hypothesis, TargetTokens

# Where a line that is too long for one translation may be cut, the best first.
_CUTS = (re.compile(r"(?<=[.!?;:])\s+|(?<=[。！？])"), re.compile(r"\s+"))
# Draws of the parts of a line are numbered this far apart.
_PARTS_APART = 1 << 40


class Decoding(Protocol):
    """How translations are found: `BeamSearch`, `TranslationSampling`."""

    def translations(
        self,
        model: TranslationModel,
        sources: Sequence[Sequence[int]],
        *,
        tokens: TargetTokens,
        numbers: Sequence[int],
        max_positions: int,
        keep_attention: bool = False,
    ) -> list[list[Hypothesis]]: ...


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What a translation attended to. source, target: their subwords, as `JointSubwords.names` has them, each
    with its end, the source with the language to translate into first. attention: float32 [target, source];
    each row adds up to 1."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    attention: npt.NDArray[np.float32] = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Translation:
    """One translation of a line. score, logprob: as in `Hypothesis`; of a line in parts, their sums.
    alignments: of each part, where they were asked for."""

    text: str
    score: float
    logprob: float
    alignments: tuple[Alignment, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LineTranslator:
    """Translates lines into one language.

    max_subwords: longer lines are translated in parts, which are cut where a sentence ends, else at a space,
    else anywhere. lines_at_once: how many lines are read, and translated side by side.
    align: keep the attention of translations.
    """

    model: TranslationModel
    vocabulary: JointSubwords
    target_language: str
    decoding: Decoding
    max_subwords: int = 250
    lines_at_once: int = 64
    align: bool = False

    def __post_init__(self) -> None:
        for name in ("max_subwords", "lines_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        self.vocabulary.language_id(self.target_language)

    def translate(self, lines: Iterable[str]) -> Iterator[list[Translation]]:
        """The best translations of each line, best first, in the order of the lines.

        Lines are cleaned as the training text was. One without any text has one translation, which is empty.
        A line's translation does not depend on the other lines; one that is drawn does on its number.
        """
        remaining, number = iter(lines), 0
        while window := list(islice(remaining, self.lines_at_once)):
            yield from self.translate_together(window, first_number=number)
            number += len(window)

    def translate_together(
        self,
        lines: Sequence[str],
        *,
        first_number: int = 0,
        tell: Callable[[int, int], None] = lambda done, of: None,
    ) -> Iterator[list[Translation]]:
        """The same of lines that are all there, each as soon as its last part is done.

        first_number: of the first among all lines. tell: is told from time to time how many parts of the
        lines have been translated, of how many.
        """
        parts = [list(self._parts(clean_line(line))) for line in lines]
        numbers = [
            first_number + line + part * _PARTS_APART
            for line, several in enumerate(parts)
            for part in range(len(several))
        ]
        sources = [
            self.vocabulary.encode_source(text, target_language=self.target_language)
            for several in parts
            for text, _ in several
        ]
        found: list[list[Hypothesis]] = []
        first = 0
        for several in parts:
            while len(found) < first + len(several):
                # More than there are lines, so that a few long ones do not leave a small batch over.
                together = slice(len(found), len(found) + 4 * self.lines_at_once)
                found += self.decoding.translations(
                    self.model,
                    sources[together],
                    tokens=target_tokens(self.vocabulary),
                    numbers=numbers[together],
                    max_positions=64 * self.lines_at_once,
                    keep_attention=self.align,
                )
                tell(len(found), len(sources))
            own = slice(first, first + len(several))
            yield self._joined(sources[own], found[own], gaps=[gap for _, gap in several])
            first += len(several)

    def _parts(self, line: str) -> Iterator[tuple[str, str]]:
        """The parts of a line, each with what stands between it and the next. An empty line has none."""
        if not line:
            return
        if len(line) < 2 or len(self.vocabulary.encode(line)) <= self.max_subwords:
            yield line, ""
            return
        end, start = _middle(line)
        *first, (last, _) = self._parts(line[:end])
        yield from first
        yield last, " " if end < start else ""
        yield from self._parts(line[start:])

    def _joined(
        self, sources: Sequence[list[int]], found: Sequence[list[Hypothesis]], *, gaps: Sequence[str]
    ) -> list[Translation]:
        """Of the parts' translations the best ones together, the second best ones together, ..."""
        num_best = max(map(len, found), default=1)
        joined = []
        for rank in range(num_best):
            chosen = [hypotheses[min(rank, len(hypotheses) - 1)] for hypotheses in found]
            texts = [
                one_line(self.vocabulary.decode(each.tokens)) + gap
                for each, gap in zip(chosen, gaps, strict=True)
            ]
            alignments = map(self._alignment, sources, chosen) if self.align else ()
            joined.append(
                Translation(
                    text="".join(texts),
                    score=sum(each.score for each in chosen),
                    logprob=sum(each.logprob for each in chosen),
                    alignments=tuple(alignments),
                )
            )
        return joined

    def _alignment(self, source: list[int], found: Hypothesis) -> Alignment:
        assert found.attention is not None, "the decoding kept no attention"
        return Alignment(
            source=tuple(self.vocabulary.names(source)),
            target=tuple(self.vocabulary.names([*found.tokens, self.vocabulary.end_id])),
            attention=found.attention,
        )


def target_tokens(vocabulary: JointSubwords) -> TargetTokens:
    """What a translation begins and ends with, and what it never holds: padding and names of languages."""
    names = (vocabulary.language_id(language) for language in vocabulary.languages)
    return TargetTokens(
        begin_id=vocabulary.begin_id, end_id=vocabulary.end_id, never=(vocabulary.pad_id, *names)
    )


def _middle(line: str) -> tuple[int, int]:
    """Where the first half of a line ends and the second begins, white space between them left out."""
    quarter, half = len(line) // 4, len(line) // 2
    for pattern in _CUTS:
        gaps = [m.span() for m in pattern.finditer(line, quarter, len(line) - quarter)]
        if gaps := [(end, start) for end, start in gaps if end > 0 and start < len(line)]:
            return min(gaps, key=lambda gap: abs(gap[0] - half))
    return half, half
