import fcntl
from pathlib import Path
from typing import IO

import pytest

from sparsegate.data.files import new_directory, refuse_existing, write_atomically

KEY, OTHER_KEY = "0123456789abcdef", "fedcba9876543210"


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "below" / "target"
    with new_directory(target, key=KEY) as directory:
        (directory / "file").write_text("content")
        assert not target.exists()
        assert directory.parent == target.parent
    assert [path.name for path in target.iterdir()] == ["file"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, OSError, AssertionError])
def test_an_error_leaves_nothing_and_an_empty_target_alone(
    error: type[BaseException], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(error), new_directory(target, key=KEY) as directory:  # noqa: PT012
        (directory / "file").write_text("content")
        raise error
    assert list(tmp_path.rglob("*")) == [target]


@pytest.mark.parametrize("kind", ["file", "full", "link"])
def test_what_exists_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    before = sorted(tmp_path.rglob("*"))
    message = rf"{kind}: exists already and is not an empty directory; choose another, or remove it"
    with pytest.raises(FileExistsError, match=message):
        refuse_existing(tmp_path / kind)
    with pytest.raises(FileExistsError, match=message), new_directory(tmp_path / kind, key=KEY):
        raise AssertionError
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ChildProcessError])
def test_what_was_interrupted_goes_on_under_the_same_key(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(error), new_directory(target, key=KEY) as directory:  # noqa: PT012
        (directory / "file").write_text("content")
        raise error
    assert not target.exists()
    with new_directory(target, key=KEY) as directory:
        assert (directory / "file").read_text() == "content"
    assert list(tmp_path.iterdir()) == [target]


def test_what_was_interrupted_is_removed_under_another_key(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt), new_directory(target, key=KEY) as directory:  # noqa: PT012
        (directory / "file").write_text("content")
        raise KeyboardInterrupt
    with new_directory(target, key=OTHER_KEY) as directory:
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [directory.name]
    assert list(target.iterdir()) == []


def test_what_was_interrupted_outlives_a_directory_of_a_shorter_name(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "news-small", key=KEY) as interrupted:
        raise KeyboardInterrupt
    with new_directory(tmp_path / "news", key=OTHER_KEY):
        pass
    assert interrupted.exists()
    with new_directory(tmp_path / "news-small", key=KEY) as again:
        assert again == interrupted


def test_what_appears_meanwhile_stays_and_nothing_else_does(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(FileExistsError), new_directory(target, key=KEY) as slow:  # noqa: PT012
        (slow / "file").write_text("slow")
        target.mkdir()
        (target / "file").write_text("fast")
    assert (target / "file").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [target]


def refuse_a_second(target: Path, key: str) -> None:
    with (
        pytest.raises(FileExistsError, match="target: another process is making it; wait for it, or end it"),
        new_directory(target, key=key),
    ):
        raise AssertionError


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_of_two_that_make_the_same_the_later_is_refused_at_once(key: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with new_directory(target, key=KEY) as first:
        (first / "file").write_text("first")
        refuse_a_second(target, key)
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_lock_whose_file_was_removed_before_it_was_held_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flock, removed = tmp_path / "target", fcntl.flock, []

    def end_of_another(file: IO[str], operation: int) -> None:
        if not removed:
            removed.append((tmp_path / ".tmp-target.lock").unlink())
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", end_of_another)
    with new_directory(target, key=KEY):
        refuse_a_second(target, OTHER_KEY)
    assert removed
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_dead_process_left_is_removed_and_other_things_stay(tmp_path: Path) -> None:
    others = [
        f"another-{KEY}",
        f"target[x]-{KEY}",
        f"target-small-{KEY}",
        f"target-{KEY}-{KEY}",
        "target-mine",
    ]
    for name in (*others, f"target-{OTHER_KEY}"):
        (tmp_path / f".tmp-{name}").mkdir()
        (tmp_path / f".tmp-{name}/train.tokens").touch()
    (tmp_path / ".tmp-target.lock").touch()
    (tmp_path / ".tmp-target-small.lock").touch()
    before = set(tmp_path.rglob("*"))
    with new_directory(tmp_path / "target", key=KEY):
        assert not (tmp_path / f".tmp-target-{OTHER_KEY}").exists()
    removed = {f".tmp-target-{OTHER_KEY}", f".tmp-target-{OTHER_KEY}/train.tokens", ".tmp-target.lock"}
    after = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert after == {path.relative_to(tmp_path).as_posix() for path in before} - removed | {"target"}


def test_a_file_holds_the_old_content_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write \(No space left on device\); free space, or choose.*/file"
    ):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
