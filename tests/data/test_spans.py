import gzip
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsegate.data import TextOptions
from sparsegate.data.spans import Span, cut
from sparsegate.data.text import read_lines
from tests.data.making import write

KEEP = TextOptions(keep_blank_lines=True)


def read(spans: list[tuple[Span, ...]], options: TextOptions = KEEP) -> list[str]:
    return [
        line
        for part in spans
        for span in part
        for batch in read_lines(span, options=options, advance=lambda num_bytes: None)
        for line in batch
    ]


@example(lines=["", ""], part_bytes=1, ending="\n", last=True)
@example(lines=["é", "", "\ufeffé"], part_bytes=2, ending="\r\n", last=False)
@given(
    lines=st.lists(st.text(alphabet="aé中\t ", max_size=12), min_size=1, max_size=12),
    part_bytes=st.integers(1, 40),
    ending=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_every_line_is_in_one_span_however_the_text_is_cut(
    lines: list[str], part_bytes: int, ending: str, last: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("spans")
    lines = lines if last or lines[-1] else [*lines, "end"]
    text = "\ufeff" + ending.join(lines) + (ending if last else "")
    documents = "\n".join(json.dumps({"text": line}) for line in lines)
    files = [
        write(folder / "a.txt", text),
        write(folder / "b", ""),
        write(folder / "c.txt.gz", gzip.compress(text.encode())),
        write(folder / "d.jsonl", documents),
        write(folder / "e.txt", text),
    ]
    parts = cut(files, part_bytes=part_bytes)
    in_documents = [line for line in lines if line]
    assert read(parts) == [*lines, *lines, *in_documents, *lines]
    assert sum(span.num_bytes for part in parts for span in part) == sum(f.stat().st_size for f in files)


def test_parts_hold_the_bytes_asked_for_and_many_small_files_are_one_part(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{number:02}", "x" * 9 + "\n") for number in range(25)]
    parts = cut(files, part_bytes=100)
    assert [len(part) for part in parts] == [10, 10, 5]
    large = write(tmp_path / "large", "x" * 99 + "\n")
    assert [[span.num_bytes for span in part] for part in cut([files[0], large], part_bytes=60)] == [
        [10, 50],
        [50],
    ]


@pytest.mark.parametrize("start", [0, 1, 5, 21, 30, 33])
def test_a_bad_line_is_called_by_its_number_in_the_file(start: int, tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", b"one\ntwo\n\nfour\nfive\nsix\n" + b"seven \xff bad\neight\n")
    at = path.read_bytes().index(b"seven")
    span = Span(path=path, start=min(start, at), stop=path.stat().st_size)
    with pytest.raises(ValueError, match=r"text.txt, line 7: byte 0xff is not UTF-8"):
        read([(span,)])


def test_an_endless_line_is_refused_by_its_own_span_and_skipped_by_the_others(tmp_path: Path) -> None:
    options = TextOptions(max_line_bytes=2000, keep_blank_lines=True)
    path = write(tmp_path / "text.txt", b"a\n" + b"x" * 100_000 + b"\nb\n")
    first, *others = cut([path], part_bytes=10_000)
    with pytest.raises(ValueError, match=r"line 2: longer than max_line_bytes \(2,000\); break the line"):
        read([first], options)
    assert read(others, options) == ["b"]


def test_progress_comes_to_the_bytes_of_each_span(tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", "".join(f"line {number}\n" for number in range(5000)))
    for part in cut([path], part_bytes=7000):
        for span in part:
            steps: list[int] = []
            for _ in read_lines(span, options=KEEP, advance=steps.append):
                pass
            assert sum(steps) == span.num_bytes
            assert min(steps) >= 0
