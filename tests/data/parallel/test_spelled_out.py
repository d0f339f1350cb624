import re
from importlib import import_module
from itertools import permutations
from pathlib import Path

import pytest

from sparsegate.data.parallel import prepare_translation
from sparsegate.data.parallel.spelled_out import (
    KINDS,
    SPELLED_LANGUAGES,
    Meaning,
    spelled_out,
    spelled_out_files,
    written,
)

num2words = pytest.importorskip("num2words").num2words


def english_french(part: str, num_pairs: int, seed: int = 0) -> list[tuple[str, str]]:
    return spelled_out(source="en", target="fr", num_pairs=num_pairs, seed=seed, part=part)


def test_pairs_are_a_pure_function_of_the_seed() -> None:
    assert english_french("train", 300) == english_french("train", 300)
    assert english_french("train", 300) != english_french("train", 300, seed=1)
    assert english_french("train", 300)[:100] == english_french("train", 100)


def test_no_line_of_one_part_is_in_another_whatever_the_seeds() -> None:
    lines = {
        part: [line for seed in (0, 1) for pair in english_french(part, number, seed) for line in pair]
        for part, number in (("train", 3000), ("valid", 500), ("test", 500))
    }
    for one, other in permutations(lines, 2):
        assert not set(lines[one]) & set(lines[other])


def test_no_meaning_comes_twice_in_a_part() -> None:
    assert len({target for _, target in english_french("train", 3000)}) == 3000


@pytest.mark.parametrize(("source", "target"), list(permutations(SPELLED_LANGUAGES, 2)))
def test_numbers_are_those_of_num2words(source: str, target: str) -> None:
    pairs = spelled_out(source=source, target=target, num_pairs=400, seed=0, part="train")
    figures = [(line, words) for line, words in pairs if re.fullmatch(r"[\d.,\u202f]+", line)]
    assert len(figures) > 20
    for line, words in figures:
        assert words == num2words(int(re.sub(r"\D", "", line)), lang=target)
    assert not any(re.search(r"\d", words) for _, words in pairs)
    assert 0.3 < sum(bool(re.search(r"\d", line)) for line, _ in pairs) / 400 < 0.7


@pytest.mark.parametrize("language", SPELLED_LANGUAGES)
def test_sums_are_right(language: str) -> None:
    other = "de" if language == "en" else "en"
    pairs = spelled_out(source=language, target=other, num_pairs=400, seed=0, part="train")
    sums = [[int(re.sub(r"\D", "", n)) for n in re.findall(r"\d[\d.,\u202f]*", line)] for line, _ in pairs]
    sums = [numbers for numbers in sums if len(numbers) == 3]
    assert len(sums) > 20
    assert all(first + second == third for first, second, third in sums)


@pytest.mark.parametrize(
    ("meaning", "language", "in_figures", "in_words"),
    [
        (Meaning("number", (81_003,)), "en", "81,003", "eighty-one thousand and three"),
        (Meaning("quantity", (3407, 0)), "fr", "3\u202f407 livres", "trois mille quatre cent sept livres"),
        (Meaning("quantity", (22, 4)), "es", "22 gatos", "veintidós gatos"),
        (Meaning("date", (1, 0, 1900)), "fr", "1er janvier 1900", "le premier janvier mille neuf cents"),
        (
            Meaning("date", (3, 2, 1987)),
            "de",
            "3. März 1987",
            "der dritte März neunzehnhundertsiebenundachtzig",
        ),
        (Meaning("date", (3, 2, 1987)), "en", "3 March 1987", "the third of March nineteen eighty-seven"),
        (
            Meaning("sum", (14, 7)),
            "de",
            "14 plus 7 ist gleich 21",
            "vierzehn plus sieben ist gleich einundzwanzig",
        ),
    ],
)
def test_known_lines(meaning: Meaning, language: str, in_figures: str, in_words: str) -> None:
    assert written(meaning, language, in_figures=True) == in_figures
    assert written(meaning, language, in_figures=False) == in_words


def test_all_kinds_come_about_equally_often() -> None:
    pairs = english_french("train", 2000)
    sums = sum(" plus " in target for _, target in pairs)
    dates = sum(target.startswith("le ") for _, target in pairs)
    assert len(KINDS) == 4
    assert 0.2 < sums / 2000 < 0.32
    assert 0.2 < dates / 2000 < 0.32


def test_files_are_read_by_prepare(tmp_path: Path) -> None:
    sizes = {"train": 300, "valid": 40, "test": 40}
    texts = spelled_out_files(tmp_path, source="en", target="de", num_pairs=sizes, seed=5)
    dataset = prepare_translation(
        output=tmp_path / "d", **{part: [text] for part, text in texts.items()}, vocabulary_size=400
    )
    for part, number in sizes.items():
        pair = dataset.pair(part, "en-de")
        lines = zip(dataset.lines(pair.source), dataset.lines(pair.target), strict=True)
        assert list(lines) == spelled_out(source="en", target="de", num_pairs=number, seed=5, part=part)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"target": "xx"}, "language 'xx' must be one of en, de, fr, es"),
        ({"target": "en"}, r"source and target \(en\) must be different languages"),
        ({"part": "dev"}, r"part \('dev'\) must be one of train, valid, test"),
        ({"num_pairs": 20_001}, r"num_pairs \(20,001\) must be at least 1 and at most 20,000 for test"),
        ({"num_pairs": 0}, r"num_pairs \(0\) must be at least 1"),
    ],
)
def test_what_cannot_be_written_is_refused(options: dict[str, object], cause: str) -> None:
    given = {"source": "en", "target": "fr", "num_pairs": 5, "seed": 0, "part": "test"}
    with pytest.raises(ValueError, match=cause):
        spelled_out(**{**given, **options})


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("sparsegate.data.parallel.spelled_out.import_module", missing)
    with pytest.raises(
        ValueError, match=r"num2words: not installed; pip install 'sparsegate\[translation\]'"
    ):
        english_french("train", 1)
    assert import_module("num2words")
