"""Which text belongs to which split.

A line or file is held out because of a hash of its content alone, so that the same text is always in the same
split, wherever it stands and however often.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .text import TextOptions, read_lines


@dataclass(frozen=True, kw_only=True)
class SplitText:
    """The text of one split: the lines of `files` whose hash, from 0 to 1, is in [`first`, `last`)."""

    name: str
    files: tuple[Path, ...]
    first: float = 0.0
    last: float = 1.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they are on the disk."""
        return _num_bytes(self.files)

    def read(self, *, options: TextOptions, advance: Callable[[int], None]) -> Iterator[list[str]]:
        """The lines in batches of about a megabyte; see `read_lines`."""
        for file in self.files:
            for lines in read_lines(file, options=options, advance=advance):
                yield lines if self._takes_all else [line for line in lines if self._takes(line)]

    @property
    def _takes_all(self) -> bool:
        return (self.first, self.last) == (0.0, 1.0)

    def _takes(self, line: str) -> bool:
        digest = hashlib.blake2b(line.encode(), digest_size=6).digest()
        return self.first <= int.from_bytes(digest, "big") / 2**48 < self.last


def given_splits(files: Mapping[str, Sequence[Path]]) -> list[SplitText]:
    """One split for each key that has files. ValueError for a file that is in two splits, or twice in one."""
    split_of: dict[Path, str] = {}
    for split, paths in files.items():
        for path in paths:
            if path.resolve() in split_of:
                raise ValueError(
                    f"{path}: given twice, for {split_of[path.resolve()]} and for {split}; give it once"
                )
            split_of[path.resolve()] = split
    return [SplitText(name=split, files=tuple(paths)) for split, paths in files.items() if paths]


def hold_out_lines(files: Sequence[Path], shares: Mapping[str, float]) -> list[SplitText]:
    """About the given share of the lines of `files` for each key of `shares`, all others for train."""
    splits: list[SplitText] = []
    first = 0.0
    for split, share in shares.items():
        splits.append(SplitText(name=split, files=tuple(files), first=first, last=first + share))
        first += share
    return [SplitText(name="train", files=tuple(files), first=first), *splits]


def hold_out_files(files: Sequence[Path], shares: Mapping[str, float]) -> list[SplitText]:
    """Whole files, in order of their hash, until they hold the given share of all bytes; the others for
    train.

    Every split gets a file at least: ValueError if there are fewer files than splits.
    """
    if len(files) <= len(shares):
        raise ValueError(
            f"hold_out: {len(files)} files are too few to hold out files; hold out lines, or give files"
        )
    left = sorted(files, key=lambda file: (_file_hash(file), file))
    total = _num_bytes(files)
    held_out: dict[str, list[Path]] = {}
    for split, share in shares.items():
        chosen = held_out[split] = [left.pop(0)]
        splits_to_come = len(shares) - len(held_out) + 1
        while _num_bytes(chosen) < share * total and len(left) > splits_to_come:
            chosen.append(left.pop(0))
    return given_splits({"train": [file for file in files if file in set(left)], **held_out})


def _num_bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
