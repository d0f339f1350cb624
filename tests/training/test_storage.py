import hashlib
import os
import socket
from pathlib import Path

import pytest

from sparsegate.training.storage import (
    CannotSave,
    FileDigest,
    directory_atomically,
    make_directory,
    read_file,
    read_json,
    remove,
    retire,
    write_file,
    write_json_atomically,
)
from tests.helpers.os_shim import Call, OsShim

DATA = bytes(range(256)) * 100


def digest_of(data: bytes) -> FileDigest:
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def read_all(path: Path, expected: FileDigest | None = None) -> bytes:
    return bytes(read_file(path, lambda reader: reader.read(reader.size), expected=expected))


def refuse(shim: OsShim, kind: str) -> None:
    def before(call: Call) -> None:
        if call.kind == kind:
            raise OSError(5, "Input/output error")

    shim.before = before


def test_the_digest_taken_on_the_way_is_that_of_the_file(tmp_path) -> None:
    path = tmp_path / "file"
    assert write_file(path, [DATA[:7], b"", memoryview(DATA)[7:]]) == digest_of(DATA)
    assert path.read_bytes() == DATA
    assert read_all(path, digest_of(DATA)) == DATA


def test_short_writes_are_completed(tmp_path, monkeypatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1000]))
    assert write_file(tmp_path / "file", [DATA]) == digest_of(DATA)
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_file_that_exists_is_never_written_over(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", [DATA])
    assert (tmp_path / "file").read_bytes() == b"old"


def test_json_comes_back_and_replaces_what_was_there(tmp_path) -> None:
    path = tmp_path / "best.json"
    for value in ({"step": 5}, {"step": 9, "loss": 0.1}):
        write_json_atomically(path, value)
        assert read_json(path) == value
        assert os.listdir(tmp_path) == ["best.json"]


def test_json_is_replaced_through_a_link_left_under_the_temporary_name(tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".tmp-best.json").symlink_to(victim)
    write_json_atomically(tmp_path / "best.json", {"step": 9})
    assert victim.read_text() == "mine"
    assert read_json(tmp_path / "best.json") == {"step": 9}


@pytest.mark.parametrize("kind", ["create", "write", "fsync", "rename"])
def test_json_is_as_it_was_when_the_disk_refuses(tmp_path, monkeypatch, kind) -> None:
    path = tmp_path / "best.json"
    write_json_atomically(path, {"step": 5})
    with monkeypatch.context() as patch:
        refuse(OsShim(patch, tmp_path), kind)
        with pytest.raises(
            CannotSave, match=r"best.json: cannot save: Input/output error \([0-9]+ bytes needed"
        ):
            write_json_atomically(path, {"step": 9})
    assert read_json(path) == {"step": 5}
    assert os.listdir(tmp_path) == ["best.json"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "target"
    with pytest.raises(FileNotFoundError), directory_atomically(target) as temporary:
        write_file(temporary / "missing" / "file", [DATA])
    assert os.listdir(tmp_path) == []
    with directory_atomically(target) as temporary:
        write_file(temporary / "file", [DATA])
        assert not target.exists()
    assert os.listdir(tmp_path) == ["target"]
    assert (target / "file").read_bytes() == DATA


def test_what_a_directory_replaces_stays_beside_it(tmp_path) -> None:
    target = tmp_path / "target"
    for content in (b"old", b"new"):
        with directory_atomically(target) as temporary:
            write_file(temporary / "file", [content])
    assert (target / "file").read_bytes() == b"new"
    assert (tmp_path / ".replaced-target" / "file").read_bytes() == b"old"


@pytest.mark.parametrize("failing", [0, 1, 2], ids=["move away", "move in", "flush"])
def test_a_directory_is_put_back_if_its_replacement_fails(tmp_path, monkeypatch, failing) -> None:
    target = tmp_path / "target"
    with directory_atomically(target) as temporary:
        write_file(temporary / "file", [b"old"])
    with monkeypatch.context() as patch:
        faults = iter([index == failing for index in range(3)])

        def before(call: Call) -> None:
            if (call.kind == "rename" or call.path == tmp_path) and next(faults, False):
                raise OSError(5, "Input/output error")

        OsShim(patch, tmp_path).before = before
        with pytest.raises(OSError, match="Input/output"), directory_atomically(target) as temporary:
            write_file(temporary / "file", [b"new"])
    assert os.listdir(tmp_path) == ["target"]
    assert (target / "file").read_bytes() == b"old"


def test_directories_are_made_with_those_above(tmp_path) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_removal_takes_links_and_not_what_they_point_to(tmp_path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(DATA)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(kept)
    (tmp_path / "link").symlink_to(kept)
    retire(tmp_path / "link")
    retire(tmp_path / "folder")
    remove(tmp_path / "nothing")
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(kept) == ["file"]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda path: None, "missing"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/dev/null"), "a symbolic link"),
        (make_pipe, "not a regular file"),
        (make_socket, "cannot be read"),
        (lambda path: path.write_bytes(DATA[:-1]), "damaged: 25,599 bytes instead of 25,600"),
        (lambda path: path.write_bytes(DATA[:-1] + b"\0"), "damaged: its SHA-256 is [0-9a-f]{64} instead of"),
    ],
    ids=["missing", "directory", "link", "pipe", "socket", "truncated", "changed"],
)
def test_what_is_not_the_expected_file_is_refused_in_one_line(tmp_path, make, cause) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(ValueError, match=f"^{path}: [^\n]*{cause}[^\n]*$"):
        read_all(path, digest_of(DATA))


def test_nothing_that_a_damaged_file_makes_is_given_out(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    for parse in (
        lambda reader: 1,
        lambda reader: reader.read(reader.size),
        lambda reader: reader.read(10**6),
    ):
        with pytest.raises(ValueError, match="damaged: its SHA-256"):
            read_file(path, parse, expected=FileDigest(len(DATA), "0" * 64))


def test_a_failing_disk_is_told_with_the_file(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "file").write_bytes(DATA)
    monkeypatch.setattr(os, "readv", fail)
    with pytest.raises(ValueError, match="file: cannot be read: Input/output error"):
        read_all(tmp_path / "file")
