"""The log on disk: whole lines or none, and a past that a resumed run can go on from."""

import json
import math
import resource
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.training.log import JsonLog, append_whole, read_log


def line(step: int, **values) -> dict:
    return {"kind": "step", "step": step, "time": 1.5 * step, **values}


@contextmanager
def files_no_larger_than(num_bytes: int):
    """The kernel cuts a write off at this size, as a full disk does: a part lands, the rest is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_come_back_as_they_were(tmp_path):
    log = JsonLog(path=tmp_path / "log.jsonl")
    lines = [line(1, loss=4.25, note="ünï\n\u2028"), line(2, loss=1e-300), {**line(2), "kind": "checkpoint"}]
    for entry in lines:
        log.append(entry)
    assert list(read_log(tmp_path / "log.jsonl")) == lines
    assert [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().split("\n")[:-1]] == lines


def test_numbers_that_are_not_finite_are_strings_that_float_reads(tmp_path):
    JsonLog(path=tmp_path / "log.jsonl").append(line(1, a=math.nan, b=math.inf, c=-math.inf))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (entry,) = (
        json.loads(t, parse_constant=refuse) for t in (tmp_path / "log.jsonl").read_text().splitlines()
    )
    assert (entry["a"], entry["b"], entry["c"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(entry["a"]))


def test_a_log_that_is_not_there_is_empty(tmp_path):
    assert list(read_log(tmp_path / "log.jsonl")) == []
    assert JsonLog(path=tmp_path / "log.jsonl").truncate_after(5) == []
    assert not (tmp_path / "log.jsonl").exists()


@given(cut=st.integers(0, 400), step=st.integers(0, 8))
def test_a_log_cut_anywhere_loses_only_what_was_cut(tmp_path_factory, cut, step):
    path = tmp_path_factory.mktemp("cut") / "log.jsonl"
    log = JsonLog(path=path)
    for number in range(1, 8):
        log.append(line(number, loss=number / 3))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    num_whole = whole[:cut].count(b"\n")
    expected = [line(number, loss=number / 3) for number in range(1, min(num_whole, step) + 1)]
    assert log.truncate_after(step) == expected
    log.append(line(step + 1))
    assert list(read_log(path)) == [*expected, line(step + 1)]
    assert path.read_bytes().count(b"\n") == len(expected) + 1


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 50, b"\xff\xfe{", b"[1, 2]\n", b'{"step": 3}\n', b"[" * 5000 + b"\n"]
)
def test_a_damaged_line_costs_no_other(tmp_path, garbage):
    path = tmp_path / "log.jsonl"
    log = JsonLog(path=path)
    log.append(line(1))
    path.write_bytes(path.read_bytes() + garbage.removesuffix(b"\n") + b"\n")
    log.append(line(2))
    log.append(line(3))
    assert list(read_log(path)) == [line(1), line(2), line(3)]
    assert log.truncate_after(2) == [line(1), line(2)]
    assert list(read_log(path)) == [line(1), line(2)]


def test_what_was_said_before_a_resume_is_not_taken_for_the_past(tmp_path):
    log = JsonLog(path=tmp_path / "log.jsonl")
    for entry in (line(1), line(2), line(3), {**line(0), "kind": "warning"}):
        log.append(entry)
    assert log.truncate_after(2) == [line(1), line(2)]
    assert list(read_log(tmp_path / "log.jsonl")) == [line(1), line(2)]


@given(room=st.integers(0, 99))
def test_a_write_that_does_not_fit_leaves_the_file_as_it_was(tmp_path_factory, room):
    path = tmp_path_factory.mktemp("full") / "file"
    append_whole(path, b"a" * 100)
    with files_no_larger_than(100 + room), pytest.raises(OSError, match="too large"):
        append_whole(path, b"b" * 100)
    assert path.read_bytes() == b"a" * 100
    append_whole(path, b"c")
    assert path.read_bytes() == b"a" * 100 + b"c"
