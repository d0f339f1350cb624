"""Which files a text is: those given, and those of directories, checked to be complete and of one format."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .text import format_of

_SHARD = re.compile(r"(?P<before>.*?)(?P<number>\d{2,})-of-(?P<count>\d{2,})(?P<after>.*)")
_SHOWN = 5


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files of `paths`: those given, and all those below a directory, in order of their path, hidden ones
    left out.

    FileNotFoundError for one that does not exist; ValueError for what is no file, and for a directory without
    files, with files of several formats, or with an incomplete set of shards.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(_files_below(path))
            if not below:
                raise ValueError(f"{path}: a directory without files; give text files or a directory of them")
            _check_one_format(path, below)
            check_shards(below)
            files.extend(below)
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise ValueError(
                f"{path}: not a regular file; text is read more than once, so save it to a file first"
            )
        else:
            raise FileNotFoundError(f"{path}: no such file or directory")
    return files


def _files_below(directory: Path) -> Iterator[Path]:
    for parent, children, names in os.walk(directory):
        children[:] = [name for name in children if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _check_one_format(directory: Path, files: Sequence[Path]) -> None:
    first_of = {format_of(file): file for file in reversed(files)}
    if len(first_of) > 1:
        found = " and ".join(f"{kind} ({file.name})" for kind, file in sorted(first_of.items()))
        raise ValueError(f"{directory}: mixes {found}; give the files that are the text by name")


def check_shards(files: Iterable[Path], *, first: int | None = None) -> None:
    """ValueError that names what is missing of shards called ``...-00003-of-00100...``, and for an empty one.

    first: the number of the first shard; None: 0, or 1 where the last has the number of all.
    """
    sets: defaultdict[tuple[Path, str, str, str], dict[int, Path]] = defaultdict(dict)
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            sets[file.parent, match["before"], match["count"], match["after"]][int(match["number"])] = file
    for (folder, before, count, after), shards in sets.items():
        begin = first if first is not None else int(int(count) in shards)
        end = int(count) + (begin if first is None else 0)
        missing = [number for number in range(begin, end) if number not in shards]
        if missing:
            names = [f"{before}{number:0{len(count)}}-of-{count}{after}" for number in missing[:_SHOWN]]
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            cure = "download what is missing, or give the files by name"
            raise ValueError(f"{folder}: incomplete, without {', '.join(names)}{more}; {cure}")
        for _, file in sorted(shards.items()):
            if not file.stat().st_size:
                raise ValueError(f"{file}: an empty shard; download it again")
