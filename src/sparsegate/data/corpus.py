"""From the paths that a user gives to the texts that are read, and who reads each line."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .dataset import SPLITS, HeldOut, Source
from .hold_out import Text, given_splits, hold_out_files, hold_out_lines
from .layouts import Layout, layout_of
from .text_files import text_files
from .text_options import TextOptions

HoldOut = Literal["lines", "files"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is read, how, and what that says about the dataset.

    tokenized: words are what stands between white space.
    layout: the name of the layout that was recognised.
    """

    texts: list[Text]
    options: TextOptions
    tokenized: bool
    held_out: HeldOut | None
    layout: str | None

    @property
    def splits(self) -> list[str]:
        """The splits that there are, train first."""
        found = {split for text in self.texts for split in text.division.splits}
        return [split for split in SPLITS if split in found]

    @property
    def files(self) -> list[Path]:
        return [file for text in self.texts for file in text.files]

    def sources(self, split: str) -> list[Source]:
        """The files of `split`, named from the folder that holds the files of all splits."""
        folder = os.path.commonpath([file.absolute().parent for file in self.files])
        return [
            Source(name=file.absolute().relative_to(folder).as_posix(), bytes=file.stat().st_size)
            for text in self.texts
            if split in text.division.splits
            for file in text.files
        ]


def corpus_of(
    paths: Mapping[str, Sequence[Path]],
    *,
    hold_out: HoldOut,
    shares: Mapping[str, float],
    options: TextOptions,
    tokenized: bool,
) -> Corpus:
    """The corpus of the `paths` given for each split; `shares` of train are held out where there is no other.

    ValueError or FileNotFoundError for paths and shares that do not fit.
    """
    layout = _recognised(paths["train"])
    files = {split: text_files(given) for split, given in paths.items() if split != "train" or not layout}
    if layout is not None:
        files = {split: files.get(split) or list(layout.files[split]) for split in SPLITS}
        options = replace(options, keep_blank_lines=options.keep_blank_lines or layout.keep_blank_lines)
        tokenized = tokenized or layout.tokenized
    held_out = {} if files["valid"] or files["test"] or not files["train"] else _checked_shares(shares)
    return Corpus(
        texts=_texts(files, hold_out, held_out),
        options=options,
        tokenized=tokenized,
        held_out=HeldOut(by=hold_out, **held_out) if held_out else None,
        layout=None if layout is None else layout.name,
    )


def _recognised(train: Sequence[Path]) -> Layout | None:
    for path in train:
        layout = layout_of(path) if path.is_dir() else None
        if layout is not None:
            if len(train) > 1:
                raise ValueError(f"{path}: holds a whole corpus ({layout.name}); give it alone")
            return layout
    return None


def _checked_shares(shares: Mapping[str, float]) -> dict[str, float]:
    for split, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{split}_share ({share}) must be at least 0 and less than 1")
    if sum(shares.values()) >= 1:
        raise ValueError(
            f"valid_share and test_share ({sum(shares.values()):g} together) must leave text for train"
        )
    return {split: share for split, share in shares.items() if share > 0}


def _texts(files: Mapping[str, Sequence[Path]], hold_out: HoldOut, shares: Mapping[str, float]) -> list[Text]:
    """The texts, that of train first. ValueError if there is none."""
    texts = given_splits(files)
    if not texts:
        raise ValueError("train: no text; give at least one file")
    if not shares:
        return texts
    match hold_out:
        case "lines":
            return hold_out_lines(files["train"], shares)
        case "files":
            return hold_out_files(files["train"], shares)
        case _:
            raise ValueError(f"hold_out ({hold_out!r}) must be 'lines' or 'files'")
