"""A dataset does not depend on who made it, in how many parts, and how often that was killed."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegate.data import Dataset, TextOptions, prepare
from tests.data.children import Options, make, make_and_die, many_parts, start
from tests.data.making import prose, write

KINDS = ["words", "characters", "subwords", "bytes"]


def contents(dataset: Path) -> dict[str, bytes]:
    Dataset.open(dataset).verify()
    return {path.name: path.read_bytes() for path in dataset.iterdir()}


def pieces(folder: Path) -> dict[str, int]:
    """Every finished piece of work, and which file it is."""
    found = {}
    with suppress(FileNotFoundError):  # of a job that is removing them
        for path in folder.glob(".tmp-*/pieces/*.json"):
            found[path.name] = path.stat().st_ino
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return write(folder / "text", prose(9000))


def whole(text: Path, kind: str) -> dict[str, bytes]:
    """What it is, made at once by one process."""
    output = text.with_name(f"whole-{kind}")
    if not output.exists():
        options = many_parts(output, text, kind, workers=1)
        prepare(**{**options, "part_bytes": 1 << 30})
    return contents(output)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_makes_the_same_bytes(
    kind: str, workers: int, text: Path, tmp_path: Path
) -> None:
    prepare(**many_parts(tmp_path / "dataset", text, kind, workers=workers))
    assert contents(tmp_path / "dataset") == whole(text, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


@settings(max_examples=30)
@given(
    lines=st.lists(st.text(alphabet="ab é\t", max_size=9), min_size=1, max_size=9),
    part_bytes=st.integers(1, 30),
)
def test_parts_of_any_size_make_the_same_bytes(
    lines: list[str], part_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    files = [write(folder / name, "\n".join([*lines, "end"])) for name in ("a", "b", "c")]
    for output, size in (("one", 1 << 20), ("many", part_bytes)):
        prepare(
            output=folder / output,
            train=files[:2],
            test=files[2:],
            vocabulary="words",
            text=TextOptions(keep_blank_lines=True),
            part_bytes=size,
        )
    assert contents(folder / "one") == contents(folder / "many")


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_killed_again_and_again_ends_as_what_is_not(
    workers: int, kills: int, text: Path, tmp_path: Path
) -> None:
    expected = whole(text, "words")
    choose = random.Random(workers)
    killed = jobs = kept = 0
    while killed < kills:
        folder = tmp_path / str(jobs)
        options = many_parts(folder / "dataset", text, "words", workers=workers)
        # By pieces, not by the clock: children that are too slow would finish none, fast ones all of them.
        while not ended(options, choose.randint(0, 12), choose.uniform(0, 0.05)):
            killed += 1
            kept += len(pieces(folder))
        jobs += 1
        assert contents(folder / "dataset") == expected
        assert [path.name for path in folder.iterdir()] == ["dataset"]
    assert kept > 0


def ended(options: Options, after_pieces: int, and_s: float) -> bool:
    """Prepare in a child that is killed a moment after it has finished so many pieces more; whether it ended
    before. No finished piece is lost."""
    before = pieces(options["output"].parent)
    process = start(make, options)
    while process.is_alive() and len(pieces(options["output"].parent)) < len(before) + after_pieces:
        time.sleep(0.002)
    process.join(and_s)
    process.kill()
    process.join()
    after = pieces(options["output"].parent)
    if options["output"].exists():  # also where it was killed right after
        return True
    assert process.exitcode == -signal.SIGKILL
    # What stands at the end, when pieces are removed, is the whole dataset.
    assert before.items() <= after.items() or any(options["output"].parent.glob(".tmp-*/dataset.json"))
    return False


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_kill_before_any_change_ends_as_what_is_not_killed(every: int, tmp_path: Path) -> None:
    text = write(tmp_path / "text", prose(60))
    options = {"kind": "words", "workers": 1}
    prepare(**{**many_parts(tmp_path / "whole", text, **options), "part_bytes": 1500})
    expected = contents(tmp_path / "whole")
    at_change, exitcode = 1, -signal.SIGKILL
    while exitcode:
        output = tmp_path / str(at_change) / "dataset"
        made = {**many_parts(output, text, **options), "part_bytes": 1500}
        process = start(make_and_die, made, at_change)
        process.join()
        exitcode = process.exitcode
        if exitcode:
            assert exitcode == -signal.SIGKILL
            if not output.exists():
                prepare(**made)
        assert contents(output) == expected
        at_change += every
    assert at_change > 30


def test_workers_end_with_their_parent(text: Path, tmp_path: Path) -> None:
    options = many_parts(tmp_path / "dataset", text, "words", workers=3)
    process = start(make, options)
    until = time.monotonic() + 120
    while not pieces(tmp_path):
        assert process.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    using = processes_that_name(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    until = time.monotonic() + 60
    while processes_that_name(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert using
    assert processes_that_name(tmp_path) == set()


def processes_that_name(folder: Path) -> set[int]:
    """The processes that have a file of the folder open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink().is_relative_to(folder):
                found.add(int(link.parts[2]))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "record"])
def test_a_damaged_piece_is_made_again(damage: str, text: Path, tmp_path: Path) -> None:
    options = many_parts(tmp_path / "dataset", text, "words", workers=1)
    process = start(make, options)
    while len(pieces(tmp_path)) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    record = sorted(tmp_path.glob(".tmp-*/pieces/*.json"))[0]
    file = sorted(path for path in record.parent.glob(f"{record.stem}.*") if path != record)[0]
    content = file.read_bytes()
    match damage:
        case "changed":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "shorter":
            file.write_bytes(content[:-8])
        case "missing":
            file.unlink()
        case "record":
            record.write_bytes(record.read_bytes()[:-9])
    prepare(**options)
    assert contents(tmp_path / "dataset") == whole(text, "words")


@pytest.mark.parametrize(
    "file",
    [
        "count-000001.entries",
        "count-000001.counts",
        "tokens-000001.train.tokens",
        "tokens-000001.train.sentences",
    ],
)
@pytest.mark.parametrize("change", ["shorter", "other"])
def test_a_piece_that_changes_after_it_was_finished_gets_into_no_dataset(
    file: str, change: str, text: Path, tmp_path: Path
) -> None:
    """Such as by a worker of a command that was killed."""
    options = many_parts(tmp_path / "dataset", text, "words", workers=1)
    changed = []

    def change_once_finished(done: int, total: int) -> None:
        for path in tmp_path.glob(f".tmp-*/pieces/{file}"):
            if not changed and path.with_name(f"{file.split('.')[0]}.json").exists():
                content = path.read_bytes()
                path.write_bytes(content[:-3] if change == "shorter" else content[1:2] + content[1:])
                changed.append(path)

    with pytest.raises(ValueError, match=rf"{file}: changed since it was written; give the same command"):
        prepare(**options, progress=change_once_finished)
    assert changed
    assert list(tmp_path.iterdir()) == []
    prepare(**options)
    assert contents(tmp_path / "dataset") == whole(text, "words")


def test_text_that_has_changed_is_read_again(text: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "text", text.read_bytes())
    options = many_parts(tmp_path / "dataset", source, "words", workers=1)
    process = start(make, options)
    while len(pieces(tmp_path)) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    write(source, source.read_bytes().replace(b"line 1 ", b"lime 1 "))
    prepare(**options)
    again = write(tmp_path / "again/text", source.read_bytes())
    prepare(**many_parts(tmp_path / "again/dataset", again, "words", workers=1))
    assert contents(tmp_path / "dataset") == contents(tmp_path / "again/dataset")


def test_a_second_process_on_the_same_dataset_is_refused(text: Path, tmp_path: Path) -> None:
    options = many_parts(tmp_path / "dataset", text, "words", workers=1)
    process = start(make, options)
    while not pieces(tmp_path):
        assert process.is_alive()
        time.sleep(0.005)
    with pytest.raises(FileExistsError, match="dataset: another process is making it"):
        prepare(**options)
    process.join()
    assert contents(tmp_path / "dataset") == whole(text, "words")
