"""Files that are parts of one text: numbered shards, and the split that their names say."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

_HASH = "(?:-[0-9a-f]{16})?"  # in names of older data sets on hubs, another in each
_NUMBERED = re.compile(rf"(?P<before>.*?)(?P<number>\d{{2,}})-of-(?P<count>\d{{2,}}){_HASH}(?P<after>.*)")
_OF_SPLIT = re.compile(
    r"(?:.*[-_.])?(?P<split>train|validation|valid|val|dev|test)[-.]\d+-of-\d+(?P<after>.*)"
)
_OF_TEXT = re.compile(rf"{_HASH}\.(?:(?:txt|jsonl?)(?:\.gz)?|gz|parquet)")
_SPLITS = {"train": "train", "test": "test"}
_SHOWN = 5


def split_of_shard(file: Path) -> str | None:
    """The split that the name of a shard of text says; None for all other names.

    >>> split_of_shard(Path("c4-validation.00003-of-00008.json.gz"))
    'valid'
    """
    match = _OF_SPLIT.fullmatch(file.name)
    return _named_split(file) if match and _OF_TEXT.fullmatch(match["after"]) else None


def _named_split(file: Path) -> str | None:
    """The same for any ending."""
    match = _OF_SPLIT.fullmatch(file.name)
    return _SPLITS.get(match["split"], "valid") if match else None


def check_one_split(files: Sequence[Path]) -> None:
    """ValueError if some names say that a file is of valid or test and others do not: read as one text, they
    would mix splits. It names a file that is no shard of a split, where there is one."""
    split_of = {file: _named_split(file) for file in files}
    if len(set(split_of.values())) == 1 or not {"valid", "test"} & set(split_of.values()):
        return
    odd = next((file for file in files if split_of_shard(file) is None), files[0])
    splits = " and ".join(sorted({split for split in split_of.values() if split}))
    cure = "give the files of each split by name, or a folder with nothing else"
    raise ValueError(f"{odd}: does not fit among shards of {splits}; {cure}")


def check_shards(files: Iterable[Path], *, first: int | None = None) -> None:
    """ValueError that names what is missing of shards called ``...-00003-of-00100...``, and for an empty one.

    first: the number of the first shard; None: 0, or 1 where the last has the number of all.
    """
    sets: defaultdict[tuple[Path, str, str, str], dict[int, Path]] = defaultdict(dict)
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            shards = sets[file.parent, match["before"], match["count"], match["after"]]
            other = shards.setdefault(int(match["number"]), file)
            if other != file:
                raise ValueError(f"{file}: the same shard as {other.name}; remove one of them")
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
