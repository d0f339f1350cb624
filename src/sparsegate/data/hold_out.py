"""Which text belongs to which split.

A line or file is held out because of a hash of its content alone (of a line: in NFC, as it is stored), so
that the same text is always in the same split, wherever it stands and however often.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .normalization import normalize
from .spans import Span
from .text import read_lines
from .text_options import TextOptions


@dataclass(frozen=True, kw_only=True)
class Division:
    """To which of `splits` a line goes: number n gets lines whose hash, from 0 to 1, is at least bound n - 1
    and below bound n; the last gets all others."""

    splits: tuple[str, ...]
    bounds: tuple[float, ...] = ()

    def read(
        self, spans: Sequence[Span], *, options: TextOptions, advance: Callable[[int], None]
    ) -> Iterator[dict[str, list[str]]]:
        """The lines of each split in batches of about a megabyte; see `read_lines`."""
        for span in spans:
            for lines in read_lines(span, options=options, advance=advance):
                yield self.divide(lines)

    def divide(self, lines: list[str]) -> dict[str, list[str]]:
        """The lines of each split."""
        if not self.bounds:
            return {self.splits[0]: lines}
        divided: dict[str, list[str]] = {split: [] for split in self.splits}
        lists = list(divided.values())
        for line in lines:
            lists[bisect_right(self.bounds, _hash(line))].append(line)
        return divided


@dataclass(frozen=True, kw_only=True)
class Text:
    """Files whose lines are divided alike."""

    files: tuple[Path, ...]
    division: Division


def given_splits(files: Mapping[str, Sequence[Path]]) -> list[Text]:
    """One text for each key that has files. ValueError for a file that is in two splits, or twice in one."""
    split_of: dict[Path, str] = {}
    for split, paths in files.items():
        for path in paths:
            if path.resolve() in split_of:
                raise ValueError(
                    f"{path}: given twice, for {split_of[path.resolve()]} and for {split}; give it once"
                )
            split_of[path.resolve()] = split
    return [
        Text(files=tuple(paths), division=Division(splits=(split,)))
        for split, paths in files.items()
        if paths
    ]


def hold_out_lines(files: Sequence[Path], shares: Mapping[str, float]) -> list[Text]:
    """About the given share of the lines of `files` for each key of `shares`, all others for train."""
    bounds: list[float] = []
    for share in shares.values():
        bounds.append(sum(bounds[-1:]) + share)
    return [Text(files=tuple(files), division=Division(splits=(*shares, "train"), bounds=tuple(bounds)))]


def hold_out_files(files: Sequence[Path], shares: Mapping[str, float]) -> list[Text]:
    """Whole files, in order of their hash, until they hold the given share of all bytes; the others for
    train.

    Every split gets a file at least: ValueError if there are fewer files than splits.
    """
    if len(files) <= len(shares):
        raise ValueError(
            f"hold_out: {len(files)} files are too few to hold out files; hold out lines, or give files"
        )
    left = sorted(files, key=lambda file: (_file_hash(file), file))
    total = num_bytes(files)
    held_out: dict[str, list[Path]] = {}
    for split, share in shares.items():
        chosen = held_out[split] = [left.pop(0)]
        splits_to_come = len(shares) - len(held_out) + 1
        while num_bytes(chosen) < share * total and len(left) > splits_to_come:
            chosen.append(left.pop(0))
    return given_splits({"train": [file for file in files if file in set(left)], **held_out})


def num_bytes(files: Sequence[Path]) -> int:
    """Bytes of the files, as they are on the disk."""
    return sum(file.stat().st_size for file in files)


def _hash(line: str) -> float:
    return int.from_bytes(hashlib.blake2b(normalize(line).encode(), digest_size=6).digest(), "big") / 2**48


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
