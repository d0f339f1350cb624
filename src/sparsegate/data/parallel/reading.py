"""Reading pairs of lines, in constant memory.

What a line is, packed files, bad bytes and too long lines are as in `text.read_lines`. Blank lines of a
single file are passed over; in aligned files they count, and are sentences without a word.
"""

from collections.abc import Callable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

from ..text import read_raw_lines, text_fields
from ..text_options import TextOptions
from .source import ParallelText

Advance = Callable[[int], None]
Pairs = list[tuple[str, str]]

_AT_ONCE = 1 << 12
# What is longer than this many times the other side, and so many characters more, is no translation of it.
_REASON_TIMES, _REASON_PLUS = 4, 20


def read_pairs(source: ParallelText, *, options: TextOptions, advance: Advance) -> Iterator[Pairs]:
    """The pairs of one parallel text in batches of some thousands, as they stand in the files.

    ValueError in one line that names file and line for what cannot be read, and for aligned files of unequal
    length, both lengths and the first pair that looks wrong.
    """
    if len(source.files) == 2:
        return _aligned(source.files, options, advance)
    return _one_file(source, options, advance)


def _one_file(source: ParallelText, options: TextOptions, advance: Advance) -> Iterator[Pairs]:
    (path,) = source.files
    num_lines = 0
    for lines in read_raw_lines(path, options=options, advance=advance):
        pairs = []
        for number, line in enumerate(lines, start=num_lines + 1):
            if line and not line.isspace():
                where = f"{path}, line {number}"
                pairs.append(
                    _objects_pair(where, line, source, options)
                    if source.is_json
                    else _columns_pair(where, line, source)
                )
        num_lines += len(lines)
        if pairs:
            yield pairs


def _objects_pair(where: str, line: str, source: ParallelText, options: TextOptions) -> tuple[str, str]:
    first, second = text_fields(lambda: where, line, source.keys, options)
    return first, second


def _columns_pair(where: str, line: str, source: ParallelText) -> tuple[str, str]:
    columns = line.split("\t")
    first, second = source.columns
    try:
        return columns[first], columns[second]
    except IndexError:
        cure = "separate the languages by a tab, or name other columns"
        raise ValueError(
            f"{where}: {len(columns)} columns, but text is in columns {first + 1} and {second + 1}; {cure}"
        ) from None


def _aligned(paths: tuple[Path, ...], options: TextOptions, advance: Advance) -> Iterator[Pairs]:
    first, second = (
        chain.from_iterable(read_raw_lines(path, options=options, advance=advance)) for path in paths
    )
    both = zip_longest(first, second)
    num_pairs = 0
    suspicious: str | None = None
    while pairs := list(islice(both, _AT_ONCE)):
        suspicious = suspicious or _first_suspicious(pairs, num_pairs + 1)
        if None in pairs[-1]:
            _refuse_unequal(paths, num_pairs, pairs, both, suspicious)
        num_pairs += len(pairs)
        yield pairs


def _first_suspicious(pairs: list[tuple[str | None, str | None]], number: int) -> str | None:
    """What is wrong with the first pair that can hardly be one; `number` is the line of the first of all."""
    for line, (first, second) in enumerate(pairs, start=number):
        if first is None or second is None:
            return None
        lengths = len(first.strip()), len(second.strip())
        if min(lengths) == 0 < max(lengths):
            return f"line {line}, empty on one side"
        if max(lengths) > _REASON_TIMES * min(lengths) + _REASON_PLUS:
            return f"line {line}, of {lengths[0]:,} and {lengths[1]:,} characters"
    return None


def _refuse_unequal(
    paths: tuple[Path, ...],
    num_pairs: int,
    pairs: list[tuple[str | None, str | None]],
    rest: Iterator[tuple[str | None, str | None]],
    suspicious: str | None,
) -> None:
    """ValueError with both lengths; `num_pairs` pairs were before `pairs`, and `rest` comes after them."""
    counts = [num_pairs, num_pairs]
    for pair in chain(pairs, rest):
        for side, line in enumerate(pair):
            counts[side] += line is not None
    look = (
        f"the first that looks wrong is {suspicious}" if suspicious else "no pair looks wrong before the end"
    )
    raise ValueError(
        f"{paths[0]} has {counts[0]:,} lines and {paths[1]} {counts[1]:,}, but they must be translations of "
        f"each other line by line; {look}"
    )
