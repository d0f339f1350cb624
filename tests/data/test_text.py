import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.data import TextOptions
from sparsegate.data.spans import READ_BYTES, cut, whole
from sparsegate.data.text import read_lines
from sparsegate.data.text_files import text_files
from tests.data.making import lines, write

KEEP = TextOptions(keep_blank_lines=True)
REPLACE = TextOptions(replace_bad_bytes=True)


def read(path: Path, options: TextOptions = KEEP) -> list[str]:
    return [
        line
        for batch in read_lines(whole(path), options=options, advance=lambda num_bytes: None)
        for line in batch
    ]


def refusal(path: Path, options: TextOptions = KEEP) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read(path, options)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"\xef\xbb\xbf", []),
        (b"\xef\xbb\xbf\n", [""]),
        (b"\n\xef\xbb\xbf", ["", "\ufeff"]),
        (b"one", ["one"]),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        (b"old\rmac\n", ["old\rmac"]),
        (b"\xef\xbb\xbfmark\n\xef\xbb\xbfkept", ["mark", "\ufeffkept"]),
        ("a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg\n".encode(), ["a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg"]),
        (b"  indented\t \n", ["  indented\t "]),
    ],
)
def test_lines_end_at_line_feeds_alone(content: bytes, expected: list[str], tmp_path: Path) -> None:
    assert read(write(tmp_path / "text.txt", content)) == expected
    assert read(write(tmp_path / "text.txt.gz", gzip.compress(content))) == expected
    assert read(write(tmp_path / "any.suffix", content)) == expected


def test_blank_lines_are_dropped_unless_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", "a\n\n \t\u00a0\u2028\n b \n")
    assert read(path, TextOptions()) == ["a", " b "]
    assert read(path, KEEP) == ["a", "", " \t\u00a0\u2028", " b "]


@given(
    several=st.lists(lines),
    name=st.sampled_from(["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"]),
)
def test_every_kind_of_file_gives_the_same_lines(
    several: list[str], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    several = [line.replace("\x00", "").removesuffix("\r") for line in several]
    if several:
        several[0] = several[0].lstrip("\ufeff")
    content = "".join(f"{line}\n" for line in several).encode()
    if ".json" in name:
        half = len(several) // 2
        documents = ["".join(f"{line}\n" for line in part) for part in (several[:half], several[half:])]
        content = "\n".join(json.dumps({"text": document}) for document in documents).encode()
    content = gzip.compress(content) if name.endswith(".gz") else content
    assert read(write(tmp_path_factory.mktemp("text") / name, content)) == several


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"good\nb\xffd\n", ", line 2: byte 0xff is not UTF-8; convert it with iconv, or replace_bad_bytes"),
        (b"good\n\n\xed\xa0\x80", ", line 3: byte 0xed is not UTF-8"),
        (b"cut at the end \xe4\xb8", ", line 1: byte 0xe4 is not UTF-8"),
        (b"a\nb\nbin\x00ary", ", line 3: a NUL byte; is it a binary file? replace_bad_bytes reads on"),
        (gzip.compress(b"text", mtime=0), ": not text but gzip: give its name the ending .gz"),
        (b"\xff\xfet\x00e\x00", ": not text but UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"),
        (b"PK\x03\x04...", ": not text but zip: unpack it with `unzip`"),
        (b"\xfd7zXZ\x00...", ": not text but xz"),
        (b"(\xb5/\xfd...", ": not text but zstd"),
        (b"BZh91AY&SY...", ": not text but bzip2"),
    ],
)
def test_what_is_not_text_is_refused_with_its_line_and_a_cure(
    content: bytes, cause: str, tmp_path: Path
) -> None:
    assert refusal(write(tmp_path / "text.txt", content)).startswith(cause)


def test_a_bad_line_is_named_behind_the_first_megabyte(tmp_path: Path) -> None:
    content = b"x" * 99 + b"\n"
    path = write(tmp_path / "text.txt", content * 30_000 + b"\xff\n" + content * 30_000)
    assert refusal(path).startswith(", line 30001: byte 0xff is not UTF-8")


def test_bad_bytes_are_replaced_where_asked_for(tmp_path: Path) -> None:
    assert read(write(tmp_path / "text.txt", b"b\xffd\n\x00\n"), REPLACE) == ["b\ufffdd", "\ufffd"]
    path = write(tmp_path / "text.jsonl", b'{"text": "\\ud800a\\u0000"}\n{"text": "\\ud83d\\ude00"}')
    assert read(path, REPLACE) == ["\ufffda\ufffd", "😀"]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("text", "not JSON (Expecting value: line 1 column 1 (char 0)); each line must hold one JSON object"),
        ('{"text": "a"', "not JSON"),
        ('["text"]', "no object with a text in field 'text'; name the field that holds it"),
        ('{"body": "a"}', "no object with a text in field 'text'"),
        ('{"text": 3}', "no object with a text in field 'text'"),
        ('{"text": "\\ud800"}', "a NUL or a lone surrogate in field 'text'; replace_bad_bytes reads on"),
        ('{"text": "\\u0000"}', "a NUL or a lone surrogate in field 'text'"),
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_json_lines_that_hold_no_text_are_refused_with_their_line(
    line: str, cause: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "text.jsonl", '{"text": "good"}\n\n' + line + "\n")
    assert refusal(path).startswith(f", line 3: {cause}")


def test_the_field_of_json_lines_is_chosen(tmp_path: Path) -> None:
    path = write(
        tmp_path / "text.jsonl", '{"text": "no", "body": "one\\r\\ntwo\\n"}\n{"body": ""}\n{"body": "\\n"}\n'
    )
    assert read(path, TextOptions(field="body", keep_blank_lines=True)) == ["one", "two", ""]


@pytest.mark.parametrize("limit", [1024, READ_BYTES, READ_BYTES + 1])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(limit: int, tmp_path: Path) -> None:
    options = TextOptions(max_line_bytes=limit)
    for before, after in ((b"", b""), (b"ab\n" * 1000, b"\nc\n"), (b"x" * (limit - 1) + b"\n", b"\n")):
        long = b"y" * limit
        assert read(write(tmp_path / "text.txt", before + long + after), options)
        number = before.count(b"\n") + 1
        cause = refusal(write(tmp_path / "text.txt", before + long + b"y" + after), options)
        assert cause.startswith(f", line {number}: longer than max_line_bytes ({limit:,}); break the line")


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"line {number} {number**7}\n" for number in range(2000)).encode())
    for damaged in (packed[:-9], packed[:40] + b"\xff\xff\xff" + packed[43:], packed + b"rest"):
        assert refusal(write(tmp_path / "text.gz", damaged)).startswith(": damaged gzip file (")


@pytest.mark.parametrize("name", ["text.gz", "text.jsonl.gz", "text.parquet"])
def test_a_packed_file_without_a_byte_is_refused(name: str, tmp_path: Path) -> None:
    empty = write(tmp_path / name, b"")
    assert refusal(empty) == f": 0 bytes, which is no {empty.suffix} file; download or make it again"
    with pytest.raises(ValueError, match="0 bytes, which is no"):
        cut([write(tmp_path / "text.txt", "text\n"), empty], part_bytes=1000)
    assert read(write(tmp_path / "text.gz", gzip.compress(b""))) == read(write(tmp_path / "text", b"")) == []


@pytest.mark.parametrize(
    ("content", "options", "cause"),
    [
        (
            b"a" * (1 << 20),
            TextOptions(max_gzip_ratio=2000),
            ", line 1: longer than max_line_bytes (4,194,304);",
        ),
        (
            b"a\n" * (1 << 19),
            TextOptions(),
            ": unpacks to more than max_gzip_ratio (100) times its size; raise",
        ),
    ],
    ids=["one endless line", "short lines"],
)
def test_a_gzip_bomb_is_refused_in_constant_memory(
    content: bytes, options: TextOptions, cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(32):
            file.write(content)
    tracemalloc.start()
    assert refusal(path, options).startswith(cause)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert read(path, TextOptions(max_line_bytes=1 << 26, max_gzip_ratio=2000))


def test_progress_comes_to_the_size_of_each_file(tmp_path: Path) -> None:
    content = "".join(f"line {number}\n" for number in range(200_000)).encode() + b"\n\n"
    documents = json.dumps({"text": content.decode()}).encode()
    packed = gzip.compress(content, mtime=0)
    for name, stored in (
        ("a", content),
        ("b.gz", packed),
        ("c.jsonl", documents),
        ("d", b""),
        ("e", b"\n\n"),
    ):
        path = write(tmp_path / name, stored)
        steps: list[int] = []
        for _ in read_lines(whole(path), options=TextOptions(), advance=steps.append):
            pass
        assert sum(steps) == len(stored)
        assert min(steps) >= 0


def test_files_are_those_below_a_folder_in_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.gz", ".hidden", ".git/config", "a/.tmp"):
        write(tmp_path / name, "text")
    assert text_files([tmp_path]) == [tmp_path / "a/y.gz", tmp_path / "a/z.txt", tmp_path / "b.txt"]
    assert text_files([tmp_path / "b.txt", tmp_path / "a"])[0] == tmp_path / "b.txt"


def test_paths_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.txt: no such file or directory"):
        text_files([tmp_path / "absent.txt"])
    with pytest.raises(ValueError, match="a directory without files"):
        text_files([tmp_path])
    with pytest.raises(ValueError, match="/dev/null: not a regular file; text is read more than once"):
        text_files([Path("/dev/null")])


@pytest.mark.parametrize(("name", "value"), [("max_line_bytes", 1023), ("max_gzip_ratio", 0)])
def test_impossible_limits_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be at least"):
        TextOptions(**{name: value})
