"""A dataset is complete or absent, whenever its making ends."""

import random
import signal
import time
from pathlib import Path

import pytest

from sparsegate.data import Dataset
from tests.data.children import (
    ask,
    error_with_small_files,
    make,
    make_and_die,
    options_for,
    peak_memory,
    start,
)
from tests.data.making import prose, write


def complete_or_absent(output: Path) -> bool:
    if not output.exists():
        return False
    Dataset.open(output).verify()
    return True


def nothing_is_left_beside(output: Path, text: Path) -> bool:
    make_again = start(make, options_for(output, text, "subwords"))
    make_again.join()
    Dataset.open(output).verify()
    return sorted(output.parent.iterdir()) == sorted([output, text])


@pytest.mark.parametrize("kills", [20, pytest.param(300, marks=pytest.mark.nightly)])
def test_a_kill_at_any_moment_leaves_a_complete_dataset_or_none(kills: int, tmp_path: Path) -> None:
    text = write(tmp_path / "text", prose(4000))
    begin = time.monotonic()
    start(make, options_for(tmp_path / "whole", text, "subwords")).join()
    longest = time.monotonic() - begin
    choose = random.Random(0)
    survivors = 0
    for kill in range(kills):
        output = tmp_path / str(kill) / "dataset"
        output.parent.mkdir()
        process, begin = start(make, options_for(output, text, "subwords")), time.monotonic()
        process.join(choose.uniform(0, 1.1 * longest))
        if process.exitcode is not None:  # as long as it takes now, on a machine that may be busy or idle
            longest = time.monotonic() - begin
        process.kill()
        process.join()
        survivors += complete_or_absent(output)
    assert survivors < kills


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_kill_before_any_change_leaves_a_complete_dataset_or_none(every: int, tmp_path: Path) -> None:
    outcomes = []
    for at_change in range(1, 100, every):
        folder = tmp_path / str(at_change)
        text = write(folder / "text", prose(200))
        output = folder / "dataset"
        process = start(make_and_die, options_for(output, text, "bytes"), at_change)
        process.join()
        outcomes.append(complete_or_absent(output))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if not outcomes[-1]:
            assert nothing_is_left_beside(output, text)
    assert process.exitcode == 0
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) * every > 10


@pytest.mark.parametrize("kind", ["words", "subwords"])
def test_a_full_disk_is_named_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    text = write(tmp_path / "text", prose(3000))
    for limit in (0, 100, 20_000):
        error = ask(error_with_small_files, options_for(tmp_path / "dataset", text, kind), limit)
        assert "cannot write (File too large); free space, or choose another disk" in error
        assert str(tmp_path) in error
        assert "\n" not in error
        assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("kind", ["words", "characters", "subwords", "bytes"])
def test_memory_does_not_grow_with_the_text(kind: str, tmp_path: Path) -> None:
    line = prose(800)[: 1 << 14].replace("\n", " ")
    texts = [
        write(tmp_path / f"text{megabytes}", "".join(f"{n} {line}\n" for n in range(64 * megabytes)))
        for megabytes in (2, 14)
    ]
    assert texts[1].stat().st_size - texts[0].stat().st_size >= 12 << 20

    def growth(attempt: int) -> int:
        small, large = (
            ask(peak_memory, options_for(tmp_path / f"{text.name}-{attempt}", text, kind)) for text in texts
        )
        return large - small

    # The C library's arenas can add some megabytes to one process; what holds the text holds it every time.
    assert any(growth(attempt) < 7 << 20 for attempt in range(3))
