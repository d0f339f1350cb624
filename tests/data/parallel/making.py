"""Small parallel texts for the tests of parallel data."""

from pathlib import Path

from sparsegate.data.parallel import ParallelText, TranslationDataset, prepare_translation
from tests.data.making import write

WORDS = {
    "en": "one two three four five six",
    "fr": "un deux trois quatre cinq six",
    "de": "eins zwei drei vier fünf sechs",
}


def sentence(language: str, number: int) -> str:
    """The number, and 0 to 11 words that it chooses; languages differ in length."""
    words = WORDS[language].split()
    extra = {"en": 0, "fr": number % 3, "de": number % 2}[language]
    return f"{number} " + " ".join(words[(number + place) % 6] for place in range(number % 10 + extra))


def pairs(first: str, second: str, numbers: range) -> list[tuple[str, str]]:
    return [(sentence(first, number).strip(), sentence(second, number).strip()) for number in numbers]


def tsv(path: Path, several: list[tuple[str, str]]) -> Path:
    return write(path, "".join(f"{first}\t{second}\n" for first, second in several))


def text_of(folder: Path, pair: str, numbers: range, name: str = "train") -> ParallelText:
    first, second = pair.split("-")
    path = tsv(folder / f"{name}.{pair}.tsv", pairs(first, second, numbers))
    return ParallelText(languages=(first, second), files=(path,))


def dataset_of(folder: Path, sizes: dict[str, int], **options: object) -> TranslationDataset:
    """A dataset of as many train pairs as `sizes` says, and 40 to validate and to test on."""
    parts = {"train": 0, "valid": 1000, "test": 2000}
    texts = {
        part: [
            text_of(folder, pair, range(first, first + (size if part == "train" else 40)), part)
            for pair, size in sizes.items()
        ]
        for part, first in parts.items()
    }
    return prepare_translation(output=folder / "dataset", **texts, **{"vocabulary_size": 300, **options})
