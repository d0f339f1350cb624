"""Small texts and datasets for the tests of the data floor."""

from pathlib import Path

from hypothesis import strategies as st

from sparsegate.data import Dataset, Normalization, TextOptions, Vocabulary, prepare
from sparsegate.data.train_vocabulary import CountedKind, count_entries, vocabulary_of_counts

# Letters, combining marks, joiners, apostrophes, digits, ASCII marks, kinds of white space, planes above 0.
CURIOUS = "aZé\u0301\u0308ß\u0e33\u0915\u094d\u200c\u200d'’\"`07²½_.,-=()<>/&中😀\U0001d165\ufeff"
CURIOUS += " \t\u00a0\u2028\x0b\r\x85\x00"

# The folders of the 1 Billion Word benchmark.
TRAINING = "training-monolingual.tokenized.shuffled"
HELD_OUT = "heldout-monolingual.tokenized.shuffled"

lines = st.text(
    st.one_of(st.sampled_from(CURIOUS), st.characters(exclude_categories=["Cs"])), max_size=40
).map(lambda line: line.replace("\n", ""))


def train_vocabulary(
    kind: CountedKind,
    batches: list[list[str]],
    *,
    size: int | None,
    normalization: Normalization,
    min_count: int = 1,
) -> Vocabulary:
    """The vocabulary of batches of lines."""
    count = count_entries(kind, batches, normalization=normalization)
    return vocabulary_of_counts(kind, count, size=size, min_count=min_count, normalization=normalization)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def billion_words(folder: Path) -> Path:
    """The 1 Billion Word benchmark with a line in each shard, and a file that is no text."""
    for number in range(1, 100):
        write(folder / TRAINING / f"news.en-{number:05}-of-00100", f"train {number} .\n\n")
    for number in range(50):
        write(folder / HELD_OUT / f"news.en.heldout-{number:05}-of-00050", f"held out {number} .\n")
    write(folder / "README", "not text to train on\n")
    return folder


def prose(num_lines: int) -> str:
    """Lines of one to eleven words, all different."""
    return "".join(
        f"line {number} " + " ".join(f"w{(number * 7 + place) % 23}" for place in range(number % 10)) + "\n"
        for number in range(num_lines)
    )


def dataset_of(folder: Path, text: str, *, vocabulary: str = "words", size: int | None = None) -> Dataset:
    """A dataset whose splits all hold `text`, blank lines included."""
    files = {split: [write(folder / f"{split}.txt", text)] for split in ("train", "valid", "test")}
    return prepare(
        output=folder / "dataset",
        **files,
        vocabulary=vocabulary,
        vocabulary_size=size,
        text=TextOptions(keep_blank_lines=True),
    )
