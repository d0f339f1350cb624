import gzip
import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data import TextOptions
from sparsegate.data.parallel import ParallelText, parse_parallel_text
from sparsegate.data.parallel.reading import read_pairs
from tests.data.making import lines, write

Pair = tuple[str, str]


def read(text: ParallelText, options: TextOptions | None = None) -> list[Pair]:
    batches = read_pairs(text, options=options or TextOptions(), advance=lambda num_bytes: None)
    return list(chain.from_iterable(batches))


def refusal(text: ParallelText) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read(text)
    assert "\n" not in str(error.value)
    return str(error.value)


def stored(folder: Path, form: str, several: list[Pair]) -> ParallelText:
    """The pairs in a form of files."""
    if form.startswith("aligned"):
        packed = ".gz" if form.endswith("gz") else ""
        contents = ["".join(f"{pair[side]}\n" for pair in several).encode() for side in (0, 1)]
        for language, content in zip(("en", "fr"), contents, strict=True):
            write(folder / f"a.{language}{packed}", gzip.compress(content) if packed else content)
        return parse_parallel_text(f"en-fr:{folder}/a.en{packed},{folder}/a.fr{packed}")
    if form.startswith("tsv"):
        content = "".join(f"{first}\t{second}\tsource\n" for first, second in several).encode()
    else:
        content = "".join(json.dumps({"en": a, "fr": b, "x": 1}) + "\n" for a, b in several).encode()
    name = f"a.{form}"
    return parse_parallel_text(
        f"en-fr:{write(folder / name, gzip.compress(content) if form.endswith('gz') else content)}"
    )


FORMS = ["aligned", "aligned.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz"]
plain = lines.map(lambda line: "x" + line.translate({0: None, 9: None, 13: None}))


@given(several=st.lists(st.tuples(plain, plain)), form=st.sampled_from(FORMS))
def test_every_form_gives_the_same_pairs(
    several: list[Pair], form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert read(stored(tmp_path_factory.mktemp("text"), form, several)) == several


def test_columns_and_keys_are_chosen(tmp_path: Path) -> None:
    table = write(tmp_path / "a.tsv", "eins\tone\tun\n\nzwei\ttwo\tdeux")
    assert read(parse_parallel_text(f"en-fr:{table}@2,3")) == [("one", "un"), ("two", "deux")]
    objects = write(tmp_path / "a.jsonl", '{"src": "one", "ref": "un"}\n\n')
    assert read(parse_parallel_text(f"en-fr:{objects}@src,ref")) == [("one", "un")]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.tsv", "one\tun\ntwo\n", ", line 2: 1 columns, but text is in columns 1 and 2; separate the "),
        ("a.tsv", b"one\tun\n\ntw\xffo\tdeux\n", ", line 3: byte 0xff is not UTF-8; convert it with iconv"),
        ("a.tsv", b"one\tun\ntw\x00o\tdeux\n", ", line 2: a NUL byte"),
        (
            "a.jsonl",
            '{"en": "one", "fr": "un"}\n{"en": "two"}\n',
            ", line 2: no object with a text in field 'fr'",
        ),
        ("a.jsonl", '\n{"en": "one"', ", line 2: not JSON"),
        ("a.jsonl", '{"en": "\\ud800", "fr": ""}', ", line 1: a NUL or a lone surrogate in field 'en'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(
    name: str, content: str | bytes, cause: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    assert refusal(parse_parallel_text(f"en-fr:{path}")).startswith(f"{path}{cause}")


def test_bad_bytes_are_replaced_where_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"b\xffd\tbon\x00\n")
    options = TextOptions(replace_bad_bytes=True)
    assert read(parse_parallel_text(f"en-fr:{path}"), options) == [("b\ufffdd", "bon\ufffd")]


def test_blank_lines_of_aligned_files_count(tmp_path: Path) -> None:
    write(tmp_path / "a.en", "one\n\nthree\n")
    write(tmp_path / "a.fr", "un\n\ntrois\n")
    text = parse_parallel_text(f"en-fr:{tmp_path}/a.en,{tmp_path}/a.fr")
    assert read(text) == [("one", "un"), ("", ""), ("three", "trois")]


@pytest.mark.parametrize("scale", [1, 3000])
@pytest.mark.parametrize(
    ("middle", "look"),
    [
        ([("a", "")], "the first that looks wrong is line {}, empty on one side"),
        ([("", " \t")], "no pair looks wrong before the end"),
        ([("a" * 99, "b")], "the first that looks wrong is line {}, of 99 and 1 characters"),
        ([("a" * 24, "b")], "no pair looks wrong before the end"),
        ([("a" * 25, "b"), ("a", "")], "the first that looks wrong is line {}, of 25 and 1 characters"),
    ],
)
def test_unequal_lengths_are_told_with_the_first_pair_that_looks_wrong(
    scale: int, middle: list[Pair], look: str, tmp_path: Path
) -> None:
    several = [("good", "bon")] * 2 * scale + middle + [("end", "fin")] * scale
    first = write(tmp_path / "a.en", "".join(f"{pair[0]}\n" for pair in several) + "more\n" * scale)
    second = write(tmp_path / "a.fr", "".join(f"{pair[1]}\n" for pair in several))
    for one, other, more in ((first, second, scale), (second, first, -scale)):
        counts = len(several) + max(more, 0), len(several) + max(-more, 0)
        expected = (
            f"{one} has {counts[0]:,} lines and {other} {counts[1]:,}, but they must be translations of "
            f"each other line by line; {look.format(2 * scale + 1)}"
        )
        found = refusal(ParallelText(languages=("en", "fr"), files=(one, other)))
        assert found.replace("of 1 and 99", "of 99 and 1").replace("of 1 and 25", "of 25 and 1") == expected


def test_an_empty_file_beside_one_with_lines_is_unequal(tmp_path: Path) -> None:
    write(tmp_path / "a.en", "")
    write(tmp_path / "a.fr", "un\n")
    text = parse_parallel_text(f"en-fr:{tmp_path}/a.en,{tmp_path}/a.fr")
    assert "a.en has 0 lines and" in refusal(text)


@pytest.mark.parametrize("form", FORMS)
def test_progress_comes_to_the_size_of_all_files(form: str, tmp_path: Path) -> None:
    text = stored(tmp_path, form, [(f"line {number}", f"ligne {number}") for number in range(9000)])
    steps: list[int] = []
    for _ in read_pairs(text, options=TextOptions(), advance=steps.append):
        pass
    assert sum(steps) == text.num_bytes
