import re
from pathlib import Path

import pytest

from sparsegate.data.parallel import ParallelText, parse_parallel_text
from sparsegate.data.parallel.source import check_files
from tests.data.making import write


@pytest.mark.parametrize(
    ("word", "languages", "files", "fields"),
    [
        ("en-fr:a.en,a.fr", ("en", "fr"), ["a.en", "a.fr"], None),
        ("en-fr:dir/a.tsv", ("en", "fr"), ["dir/a.tsv"], None),
        ("pt_BR-zh_Hans:a.tsv.gz", ("pt_BR", "zh_Hans"), ["a.tsv.gz"], None),
        ("en-de:a.tsv@1,3", ("en", "de"), ["a.tsv"], ("1", "3")),
        ("en-de:a.jsonl@source,ref", ("en", "de"), ["a.jsonl"], ("source", "ref")),
        ("en-de:C:/a b/x.tsv", ("en", "de"), ["C:/a b/x.tsv"], None),
        ("en-de:me@home/a.en,me@home/a.de", ("en", "de"), ["me@home/a.en", "me@home/a.de"], None),
    ],
)
def test_a_parallel_text_is_written_in_one_word(
    word: str, languages: tuple[str, str], files: list[str], fields: tuple[str, str] | None
) -> None:
    text = parse_parallel_text(word)
    expected = ParallelText(languages=languages, files=tuple(map(Path, files)), fields=fields)
    assert text == expected
    assert text.pair == "-".join(languages)


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("train.tsv", "'train.tsv': must be languages and files, such as en-fr:train.en,train.fr"),
        ("en-fr:", "must be languages and files"),
        ("enfr:a.tsv", "pair 'enfr' must be two languages with a hyphen, such as en-fr"),
        ("en-fr-de:a.tsv", "language 'fr-de' must be a code such as de, pt_BR or zh_Hans"),
        ("e-fr:a.tsv", "language 'e' must be a code"),
        ("../en-fr:a.tsv", "language '../en' must be a code"),
        ("en-en:a.tsv", "pair 'en-en': its languages must be different"),
        ("en-fr:a,b,c", "en-fr: 3 files; give two aligned ones, or one of both languages"),
        ("en-fr:a.en,a.en", "a.en: given for both languages; give one file for each"),
        ("en-fr:a.jsonl,b.jsonl", "a.jsonl: give JSON lines alone, with both languages in each object"),
        ("en-fr:a.parquet", "a.parquet: parquet; give parallel text as columns or JSON lines"),
        ("en-fr:a.tsv@0,1", "a.tsv: column '0' must be a number, counted from 1"),
        ("en-fr:a.tsv@en,fr", "a.tsv: column 'en' must be a number"),
    ],
)
def test_what_is_no_parallel_text_is_refused_in_one_line(word: str, cause: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_parallel_text(word)
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_of_two_files_are_refused() -> None:
    with pytest.raises(ValueError, match="en-fr: fields are of one file, but two are given"):
        ParallelText(languages=("en", "fr"), files=(Path("a"), Path("b")), fields=("1", "2"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.tsv: no such file or directory"):
        check_files({"train": [parse_parallel_text(f"en-fr:{tmp_path}/absent.tsv")]})
    with pytest.raises(ValueError, match="a directory; parallel text is in files"):
        check_files({"train": [parse_parallel_text(f"en-fr:{tmp_path}")]})


@pytest.mark.parametrize(
    ("train", "test", "twice"),
    [
        ("en-fr:a.tsv en-fr:a.tsv", "", "a.tsv: given twice for en-fr of train; give it once"),
        ("en-fr:a.tsv en-fr:a.tsv@1,2", "", "a.tsv: given twice for en-fr of train; give it once"),
        (
            "en-fr:a.jsonl",
            "en-fr:a.jsonl@en,fr",
            "a.jsonl: given twice, for train (en-fr) and for test (en-fr)",
        ),
        ("en-fr:a.tsv", "en-fr:./a.tsv", "a.tsv: given twice, for train (en-fr) and for test (en-fr)"),
        ("en-fr:a.tsv", "fr-en:a.tsv@2,1", "a.tsv: given twice, for train (en-fr) and for test (fr-en)"),
        ("en-fr:a.tsv", "en-de:a.tsv@1,3", "a.tsv: given twice, for train (en-fr) and for test (en-de)"),
        ("en-fr:a.en,a.fr", "fr-en:a.fr,a.en", "a.fr: given twice, for train (en-fr) and for test (fr-en)"),
        ("en-fr:a.en,a.fr", "en-de:a.en,a.de", "a.en: given twice, for train (en-fr) and for test (en-de)"),
        ("en-fr:a.tsv@1,2 en-fr:a.tsv@1,3 en-de:a.tsv@1,2 fr-en:a.tsv@2,1", "", None),
        ("en-fr:a.en,a.fr fr-en:a.fr,a.en en-de:a.en,a.de", "", None),
    ],
)
def test_a_text_is_given_for_one_part_and_once_for_a_pair(
    train: str, test: str, twice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.tsv", "a.jsonl", "a.en", "a.fr", "a.de"):
        write(tmp_path / name, "text")
    parts = {
        part: [parse_parallel_text(word) for word in words.split()]
        for part, words in (("train", train), ("test", test))
    }
    if twice is None:
        check_files(parts)
    else:
        with pytest.raises(ValueError, match=re.escape(twice)):
            check_files(parts)
