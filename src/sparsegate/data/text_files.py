"""Which files a text is: those given, and those of directories, checked to be complete and of one format."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .shards import check_one_split, check_shards
from .text import format_of


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files of `paths`: those given, and all those below a directory, in order of their path, hidden ones
    left out.

    FileNotFoundError for one that does not exist; ValueError for what is no file, and for a directory without
    files, with files of several formats or splits, or with an incomplete set of shards.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(_files_below(path))
            if not below:
                raise ValueError(f"{path}: a directory without files; give text files or a directory of them")
            check_one_format(path, below)
            check_one_split(below)
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


def check_one_format(directory: Path, files: Sequence[Path]) -> None:
    """ValueError that names a file of each format if the files of a directory are of several."""
    first_of = {format_of(file): file for file in reversed(files)}
    if len(first_of) > 1:
        found = " and ".join(f"{kind} ({file.name})" for kind, file in sorted(first_of.items()))
        raise ValueError(f"{directory}: mixes {found}; give the files that are the text by name")
