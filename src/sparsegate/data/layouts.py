"""Folders of well-known corpora: their files say which split they are, and how their text is to be read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .shards import check_shards, split_of_shard
from .text_files import check_one_format

_BILLION_TRAINING = "training-monolingual.tokenized.shuffled"
_BILLION_HELD_OUT = "heldout-monolingual.tokenized.shuffled"
_BILLION_PARTS = {"valid": "news.en.heldout-00001-of-00050", "test": "news.en.heldout-00000-of-00050"}
_WIKITEXT = re.compile(r"wiki\.(train|valid|test)\.(tokens|raw)")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A corpus that was recognised: the files of its splits, and whether they are tokenised and keep blank
    lines."""

    name: str
    files: Mapping[str, tuple[Path, ...]]
    tokenized: bool
    keep_blank_lines: bool


def layout_of(folder: Path) -> Layout | None:
    """The layout of a folder, None where it is none of those known.

    - The 1 Billion Word benchmark (Chelba et al. 2013): the test part is ``news.en.heldout-00000-of-00050``,
      as in the literature; the valid part, for which there is no convention, is ``...-00001-of-00050``, and
      the other 48 are left aside. Shard 0 of training is what was held out, so that there are 99.
    - WikiText: ``wiki.train.tokens`` and so on (or ``.raw``); blank lines are sentences, as in its counts.
    - Shards that name their split, as those of C4 and of data sets on hubs:
      ``c4-train.00000-of-01024.json.gz``, ``validation-00000-of-00001.parquet``; nothing else may stand
      beside them.

    ValueError if it is one of these with files missing, or of several formats.
    """
    for recognise in _LAYOUTS:
        if layout := recognise(folder):
            return layout
    return None


def _billion_words(folder: Path) -> Layout | None:
    if not (folder / _BILLION_TRAINING).is_dir():
        return None
    training = tuple(sorted((folder / _BILLION_TRAINING).glob("news.en-*-of-*")))
    if not training:
        raise ValueError(
            f"{folder / _BILLION_TRAINING}: no news.en-00001-of-00100 and so on; unpack it again"
        )
    check_shards(training, first=1)
    held_out = {split: folder / _BILLION_HELD_OUT / name for split, name in _BILLION_PARTS.items()}
    for file in held_out.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; unpack the benchmark again")
    return Layout(
        name="1 Billion Word benchmark",
        files={"train": training, **{split: (file,) for split, file in held_out.items()}},
        tokenized=True,
        keep_blank_lines=False,
    )


def _wikitext(folder: Path) -> Layout | None:
    found = {path.name: path for path in folder.iterdir() if _WIKITEXT.fullmatch(path.name)}
    for ending in ("tokens", "raw"):
        names = {split: f"wiki.{split}.{ending}" for split in ("train", "valid", "test")}
        if names["train"] in found:
            for name in names.values():
                if name not in found:
                    raise FileNotFoundError(f"{folder / name}: missing; download WikiText again")
            return Layout(
                name="WikiText",
                files={split: (found[name],) for split, name in names.items()},
                tokenized=True,
                keep_blank_lines=True,
            )
    return None


def _shards_that_name_their_split(folder: Path) -> Layout | None:
    files: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        split = split_of_shard(path) if path.is_file() else None
        if split is None:
            return None
        files[split].append(path)
    if not files["train"] or not (files["valid"] or files["test"]):
        return None
    shards = [path for paths in files.values() for path in paths]
    check_one_format(folder, shards)
    check_shards(shards)
    return Layout(
        name="shards that name their split",
        files={split: tuple(paths) for split, paths in files.items()},
        tokenized=False,
        keep_blank_lines=False,
    )


_LAYOUTS: tuple[Callable[[Path], Layout | None], ...] = (
    _billion_words,
    _wikitext,
    _shards_that_name_their_split,
)
