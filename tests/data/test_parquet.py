"""Parquet files. All but one need pyarrow, as the package does for them alone."""

import sys
from pathlib import Path
from typing import Any

import pytest

from sparsegate.data import TextOptions, prepare
from sparsegate.data.spans import cut, whole
from sparsegate.data.text import read_lines
from tests.data.making import write

KEEP = TextOptions(keep_blank_lines=True)


@pytest.fixture
def pa() -> Any:
    pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    return pyarrow


def make(pa: Any, path: Path, column: Any, *, name: str = "text", rows: int = 4) -> Path:
    table = pa.table({"id": list(range(len(column))), name: column})
    pa.parquet.write_table(table, path, row_group_size=rows)
    return path


def read(path: Path, options: TextOptions = KEEP, part_bytes: int = 1 << 20) -> list[str]:
    return [
        line
        for part in cut([path], part_bytes=part_bytes)
        for span in part
        for batch in read_lines(span, options=options, advance=lambda num_bytes: None)
        for line in batch
    ]


def refusal(path: Path, options: TextOptions = KEEP) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read(path, options)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(path))


@pytest.mark.parametrize("part_bytes", [1, 100, 700, 1 << 20])
def test_every_row_is_read_once_however_the_file_is_cut(pa: Any, part_bytes: int, tmp_path: Path) -> None:
    rows = [f"row {number}\nmore é {number}\n" for number in range(100)]
    path = make(pa, tmp_path / "a.parquet", rows)
    assert read(path, part_bytes=part_bytes) == "".join(rows).split("\n")[:-1]


def test_every_kind_of_text_column_is_read_and_another_column_by_its_name(pa: Any, tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        column = pa.array(["one", "", "two\r\nthree"], type=kind)
        path = make(pa, tmp_path / "a.parquet", column, name="body")
        assert read(path, TextOptions(field="body")) == ["one", "two", "three"]


def test_the_column_is_that_of_the_name_and_of_no_part_of_it(pa: Any, tmp_path: Path) -> None:
    table = pa.table({"a": [{"b": "wrong"}], "a.b": ["right"], "b": ["wrong"]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", TextOptions(field="a.b")) == ["right"]


def test_two_columns_of_the_name_are_refused(pa: Any, tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "id", "text"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == ": 2 columns 'text'; rename all but one"
    assert read(tmp_path / "a.parquet", TextOptions(field="id")) == ["b"]


def test_progress_comes_to_the_size_of_the_file(pa: Any, tmp_path: Path) -> None:
    path = make(pa, tmp_path / "a.parquet", [f"row {number}" for number in range(100)])
    steps: list[int] = []
    for _ in read_lines(whole(path), options=KEEP, advance=steps.append):
        pass
    assert sum(steps) == path.stat().st_size
    assert min(steps) >= 0


def test_what_is_no_text_is_refused_with_its_row(pa: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    good = [f"row {number}\nmore" for number in range(9)]
    assert refusal(make(pa, path, good, name="body")) == ": no column 'text' but id, body; name the field"
    assert (
        refusal(make(pa, path, list(range(9)))) == ": column 'text' holds int64 and no text; name the field"
    )
    assert refusal(make(pa, path, [*good, None])).startswith(", row 10: no text in column 'text'")
    assert refusal(make(pa, path, [*good, "a\0"])).startswith(", row 10: a NUL byte")
    bad = pa.array([*(row.encode() for row in good), b"a\nb\xff"])
    assert refusal(make(pa, path, bad)).startswith(", row 10: byte 0xff is not UTF-8")
    assert refusal(make(pa, path, [*good, "a" * 2000]), TextOptions(max_line_bytes=1999)).startswith(
        ", row 10: longer than max_line_bytes (1,999); raise the limit"
    )


def test_a_damaged_file_is_refused(pa: Any, tmp_path: Path) -> None:
    content = make(pa, tmp_path / "a.parquet", [f"row {number}" for number in range(100)]).read_bytes()
    for damaged in (content[:-9], content[:100], b"text\n", content[:-60] + b"\xff" * 30 + content[-30:]):
        path = write(tmp_path / "b.parquet", damaged)
        assert refusal(path).startswith(": damaged parquet file (")


def test_parquet_named_as_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"PAR1...")
    assert refusal(path) == ": not text but parquet: give its name the ending .parquet"


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "a.parquet", b"PAR1")
    cause = r"a.parquet: parquet files need the package pyarrow; install it with `pip install 'sparsegate\[p"
    with pytest.raises(ValueError, match=cause):
        prepare(output=tmp_path / "dataset", train=[path], vocabulary="words")
    assert list(tmp_path.iterdir()) == [path]
