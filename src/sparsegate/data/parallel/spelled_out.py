"""Parallel text out of nothing: numbers, quantities, dates and sums, spelled out in several languages.

The numbers are those of the library ``num2words``. A line's meaning is drawn first, then written in both
languages; the source is in figures or in words, the target always in words::

    3,407 apples            trois mille quatre cent sept pommes
    14 March 1987           der vierzehnte März neunzehnhundertsiebenundachtzig
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

from ..languages import pair_name
from .source import ParallelText

Part = Literal["train", "valid", "test"]
Kind = Literal["number", "quantity", "date", "sum"]

KINDS: tuple[Kind, ...] = get_args(Kind)
# Shares of all meanings; enough of each are left to draw from. The rest is train.
_HELD_OUT = {"test": 0.05, "valid": 0.05}
_MOST = {"train": 500_000, "valid": 20_000, "test": 20_000}


@dataclass(frozen=True, kw_only=True)
class _Language:
    """How a language writes.

    nouns: plurals with spaces between them, of the same things in all languages; in Spanish masculine, as its
    numbers are. plus: a sum, of three numbers.
    """

    separator: str
    nouns: str
    months: str
    date_in_figures: Callable[[int, str, int], str]
    date_in_words: Callable[[int, str, str], str]
    plus: str


def _words(language: str, number: int, form: str = "cardinal") -> str:
    try:
        convert = import_module("num2words").num2words
    except ModuleNotFoundError:
        raise ValueError("num2words: not installed; pip install 'sparsegate[translation]'") from None
    return convert(number, lang=language, to=form)


_LANGUAGES = {
    "en": _Language(
        separator=",",
        nouns="books houses trees dogs cats windows bridges ships cakes kilometres days months",
        months="January February March April May June July August September October November December",
        date_in_figures=lambda day, month, year: f"{day} {month} {year}",
        date_in_words=lambda day, month, year: f"the {_words('en', day, 'ordinal')} of {month} {year}",
        plus="{} plus {} equals {}",
    ),
    "de": _Language(
        separator=".",
        nouns="Bücher Häuser Bäume Hunde Katzen Fenster Brücken Schiffe Kuchen Kilometer Tage Monate",
        months="Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
        date_in_figures=lambda day, month, year: f"{day}. {month} {year}",
        date_in_words=lambda day, month, year: f"der {_words('de', day, 'ordinal')} {month} {year}",
        plus="{} plus {} ist gleich {}",
    ),
    "fr": _Language(
        separator="\N{NARROW NO-BREAK SPACE}",
        nouns="livres maisons arbres chiens chats fenêtres ponts navires gâteaux kilomètres jours mois",
        months="janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
        date_in_figures=lambda day, month, year: f"{'1er' if day == 1 else day} {month} {year}",
        date_in_words=lambda day, month, year: (
            f"le {'premier' if day == 1 else _words('fr', day)} {month} {year}"
        ),
        plus="{} plus {} égale {}",
    ),
    "es": _Language(
        separator=".",
        nouns=(
            "libros edificios árboles perros gatos cristales puentes barcos pasteles kilómetros días meses"
        ),
        months="enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
        date_in_figures=lambda day, month, year: f"{day} de {month} de {year}",
        date_in_words=lambda day, month, year: (
            f"el {'primero' if day == 1 else _words('es', day)} de {month} de {year}"
        ),
        plus="{} más {} es igual a {}",
    ),
}
SPELLED_LANGUAGES = tuple(_LANGUAGES)


@dataclass(frozen=True)
class Meaning:
    """What both lines of a pair say: the numbers of a kind, or the number and place of a noun."""

    kind: Kind
    numbers: tuple[int, ...]

    @property
    def part(self) -> Part:
        """The part it belongs to, by a hash of it, whatever the seed."""
        digest = hashlib.blake2b(f"{self.kind} {self.numbers}".encode(), digest_size=6).digest()
        place = int.from_bytes(digest, "big") / 2**48
        if place < _HELD_OUT["test"]:
            return "test"
        return "valid" if place < _HELD_OUT["test"] + _HELD_OUT["valid"] else "train"


def spelled_out(*, source: str, target: str, num_pairs: int, seed: int, part: Part) -> list[tuple[str, str]]:
    """`num_pairs` pairs of lines of different meanings, a pure function of the arguments.

    No meaning is in two parts, so no line of one is in another, whatever their seeds.

    ValueError for a language that is not of `SPELLED_LANGUAGES`, for twice the same one, for more pairs than
    a part has, or if num2words is not installed.
    """
    for language in (source, target):
        if language not in _LANGUAGES:
            raise ValueError(f"language {language!r} must be one of {', '.join(_LANGUAGES)}")
    if source == target:
        raise ValueError(f"source and target ({source}) must be different languages")
    if part not in _MOST:
        raise ValueError(f"part ({part!r}) must be one of {', '.join(_MOST)}")
    if not 1 <= num_pairs <= _MOST[part]:
        raise ValueError(
            f"num_pairs ({num_pairs:,}) must be at least 1 and at most {_MOST[part]:,} for {part}"
        )
    choose = random.Random(f"{seed} {part}")
    drawn: dict[Meaning, None] = {}
    pairs = []
    while len(pairs) < num_pairs:
        meaning = _draw(choose)
        if meaning.part == part and meaning not in drawn:
            drawn[meaning] = None
            in_figures = choose.random() < 0.5
            line = written(meaning, source, in_figures=in_figures)
            pairs.append((line, written(meaning, target, in_figures=False)))
    return pairs


def spelled_out_files(
    folder: Path, *, source: str, target: str, num_pairs: Mapping[Part, int], seed: int
) -> dict[Part, ParallelText]:
    """Write the pairs of each part to ``train.en-fr.tsv`` and so on, for `prepare_translation`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[Part, ParallelText] = {}
    for part, number in num_pairs.items():
        pairs = spelled_out(source=source, target=target, num_pairs=number, seed=seed, part=part)
        path = folder / f"{part}.{pair_name(source, target)}.tsv"
        path.write_text("".join(f"{first}\t{second}\n" for first, second in pairs), encoding="utf-8")
        texts[part] = ParallelText(languages=(source, target), files=(path,))
    return texts


def _draw(choose: random.Random) -> Meaning:
    kind = choose.choice(KINDS)
    match kind:
        case "number":
            return Meaning(kind, (_number(choose, 6),))
        case "quantity":
            number = _number(choose, 5) + 2
            # After a one, languages disagree on number and gender.
            number += number % 10 == 1
            return Meaning(kind, (number, choose.randrange(len(_LANGUAGES["en"].nouns.split()))))
        case "date":
            return Meaning(
                kind, (choose.randrange(1, 29), choose.randrange(12), choose.randrange(1700, 2100))
            )
        case "sum":
            return Meaning(kind, (_number(choose, 4), _number(choose, 4)))


def _number(choose: random.Random, max_digits: int) -> int:
    """A number of one to `max_digits` digits, each number of digits as likely."""
    digits = choose.randrange(1, max_digits + 1)
    return choose.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def written(meaning: Meaning, code: str, *, in_figures: bool) -> str:
    """A meaning as a line of the language with that code."""
    language = _LANGUAGES[code]

    def number(value: int) -> str:
        return f"{value:,}".replace(",", language.separator) if in_figures else _words(code, value)

    match meaning.kind, meaning.numbers:
        case "number", (value,):
            return number(value)
        case "quantity", (value, noun):
            return f"{number(value)} {language.nouns.split()[noun]}"
        case "date", (day, month, year) if in_figures:
            return language.date_in_figures(day, language.months.split()[month], year)
        case "date", (day, month, year):
            return language.date_in_words(day, language.months.split()[month], _words(code, year, "year"))
        case "sum", (first, second):
            return language.plus.format(number(first), number(second), number(first + second))
        case _:
            raise AssertionError(meaning)
