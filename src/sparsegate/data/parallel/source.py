"""Where parallel text stands, and how that is written in one word."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..languages import languages_of, pair_name
from ..text import format_of
from ..text_files import text_files

_FILE_AND_FIELDS = re.compile(r"([^,]+)@([^@/,]+),([^@/,]+)")


@dataclass(frozen=True, kw_only=True)
class ParallelText:
    """Pairs of lines in two languages that mean the same.

    languages: two codes, in the order of the files or fields.
    files: two aligned ones, line n of one beside line n of the other; or a single one: tab-separated columns,
        or JSON lines if its name ends in ``.jsonl`` or ``.json``. All of them may be packed (``.gz``).
    fields: where in a single file the two texts stand: numbers of columns, counted from 1, or keys. None:
        columns 1 and 2, or keys that are named like the languages.
    """

    languages: tuple[str, str]
    files: tuple[Path, ...]
    fields: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        languages_of(self.pair)
        if len(self.files) not in (1, 2):
            raise ValueError(
                f"{self.pair}: {len(self.files)} files; give two aligned ones, or one of both languages"
            )
        for file in self.files:
            if format_of(file) == "parquet":
                raise ValueError(f"{file}: parquet; give parallel text as columns or JSON lines")
        if len(self.files) == 2:
            self._check_two()
        elif self.fields is not None and not self.is_json:
            for field in self.fields:
                if not re.fullmatch("[1-9][0-9]{0,5}", field):
                    raise ValueError(f"{self.files[0]}: column {field!r} must be a number, counted from 1")

    def _check_two(self) -> None:
        if self.fields is not None:
            raise ValueError(f"{self.pair}: fields are of one file, but two are given")
        for file in self.files:
            if format_of(file) == "JSON lines":
                raise ValueError(f"{file}: give JSON lines alone, with both languages in each object")
        if self.files[0].resolve() == self.files[1].resolve():
            raise ValueError(f"{self.files[0]}: given for both languages; give one file for each")

    @property
    def pair(self) -> str:
        """Such as ``en-fr``."""
        return pair_name(*self.languages)

    @property
    def is_json(self) -> bool:
        """Whether each line is a JSON object."""
        return format_of(self.files[0]) == "JSON lines"

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of JSON objects that hold the texts."""
        return self.fields or self.languages

    @property
    def columns(self) -> tuple[int, int]:
        """The columns that hold the texts, counted from 0."""
        first, second = self.fields or ("1", "2")
        return int(first) - 1, int(second) - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they are on the disk."""
        return sum(file.stat().st_size for file in self.files)


def parse_parallel_text(word: str) -> ParallelText:
    """``en-fr:train.en,train.fr``, ``en-fr:train.tsv``, ``en-fr:train.tsv@1,3`` or ``en-fr:a.jsonl@src,ref``.

    ValueError that shows the form. A path that holds a comma has to be linked to another name.
    """
    pair, colon, rest = word.partition(":")
    if not colon or not rest:
        raise ValueError(f"{word!r}: must be languages and files, such as en-fr:train.en,train.fr")
    fields = None
    if match := _FILE_AND_FIELDS.fullmatch(rest):
        rest, fields = match[1], (match[2], match[3])
    files = tuple(Path(name) for name in rest.split(","))
    return ParallelText(languages=languages_of(pair), files=files, fields=fields)


def check_files(parts: Mapping[str, Sequence[ParallelText]]) -> None:
    """ValueError or FileNotFoundError unless every file is one, and none is read for two parts, of whichever
    languages, or twice for one pair of a part."""
    read_for: dict[Path, tuple[str, str]] = {}
    places: set[object] = set()
    for part, texts in parts.items():
        for text in texts:
            for file in text.files:
                if file.is_dir():
                    raise ValueError(f"{file}: a directory; parallel text is in files")
                other, pair = read_for.setdefault(file.resolve(), (part, text.pair))
                if other != part:
                    twice = f"given twice, for {other} ({pair}) and for {part} ({text.pair})"
                    raise ValueError(f"{file}: {twice}; give it for one part")
            text_files(text.files)
            place = (text.pair, _place(text))
            if place in places:
                raise ValueError(f"{text.files[0]}: given twice for {text.pair} of {part}; give it once")
            places.add(place)


def _place(text: ParallelText) -> object:
    """Where each language stands, in no order."""
    if len(text.files) == 2:
        fields: tuple[object, ...] = (None, None)
    else:
        fields = text.keys if text.is_json else text.columns
    files = (file.resolve() for file in (text.files * 2)[:2])
    return frozenset(zip(text.languages, files, fields, strict=True))
