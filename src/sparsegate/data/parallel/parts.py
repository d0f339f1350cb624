"""Which pairs of lines belong to which part of a dataset."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..languages import languages_of, pair_name
from ..text_options import TextOptions
from .cleaning import clean_line
from .reading import Advance, Pairs, read_pairs
from .source import ParallelText


@dataclass(frozen=True, kw_only=True)
class PartText:
    """The text of one pair in one part: the lines of `texts` whose hash, from 0 to 1, is in
    [`first`, `last`).

    The hash is of the first side alone, so that equal sentences are in one part, whatever they are translated
    to.
    """

    part: str
    pair: str
    texts: tuple[ParallelText, ...]
    first: float = 0.0
    last: float = 1.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they are on the disk."""
        return sum(text.num_bytes for text in self.texts)

    def read(self, *, options: TextOptions, advance: Advance) -> Iterator[Pairs]:
        """The pairs, cleaned, in batches of some thousands; see `read_pairs`."""
        for text in self.texts:
            for pairs in read_pairs(text, options=options, advance=advance):
                clean = [(clean_line(first), clean_line(second)) for first, second in pairs]
                yield clean if self._takes_all else [pair for pair in clean if self._takes(pair[0])]

    @property
    def _takes_all(self) -> bool:
        return (self.first, self.last) == (0.0, 1.0)

    def _takes(self, line: str) -> bool:
        digest = hashlib.blake2b(line.encode(), digest_size=6).digest()
        return self.first <= int.from_bytes(digest, "big") / 2**48 < self.last


def part_texts(
    texts: Mapping[str, Sequence[ParallelText]], shares: Mapping[str, float], *, both_directions: bool
) -> list[PartText]:
    """One for each pair of each part; with `shares`, parts besides train get that share of its pairs.

    ValueError if there is none, or if the same two languages are given in both orders and also read in both.
    """
    found = [
        PartText(part=part, pair=pair, texts=tuple(text for text in some if text.pair == pair))
        for part, some in texts.items()
        for pair in dict.fromkeys(text.pair for text in some)
    ]
    if not found:
        raise ValueError("train: no parallel text; give at least one pair")
    for each in found:
        first, second = languages_of(each.pair)
        if both_directions and any(other.pair == pair_name(second, first) for other in found):
            raise ValueError(f"both_directions: {each.pair} and {second}-{first} are given; give one of them")
    return _held_out(found, shares) if shares else found


def _held_out(train: Sequence[PartText], shares: Mapping[str, float]) -> list[PartText]:
    begin: dict[str, tuple[float, float]] = {}
    first = 0.0
    for part, share in shares.items():
        begin[part] = (first, first + share)
        first += share
    ranges = {"train": (first, 1.0), **begin}
    return [
        PartText(part=part, pair=each.pair, texts=each.texts, first=low, last=high)
        for part, (low, high) in ranges.items()
        for each in train
    ]


class Reader:
    """Reads the text of parts, and tells `progress` how many bytes of all the passes to come are done."""

    def __init__(
        self,
        *,
        passes: Sequence[PartText],
        options: TextOptions,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._options = options
        self._progress = progress
        self._done = 0
        self._total = sum(text.num_bytes for text in passes)

    def __call__(self, text: PartText) -> Iterator[Pairs]:
        return text.read(options=self._options, advance=self._advance)

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)
