"""What several processes do, raise and survive."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sparsegate.data.workers import run_all
from tests.data.children import start


def make_work(folder: Path) -> Callable[[int, Callable[[int], None]], None]:
    def work(number: int, advance: Callable[[int], None]) -> None:
        advance(number)
        (folder / str(number)).write_text(str(os.getpid()))

    return work


def make_failing(failing: list[int]) -> Callable[[int, Callable[[int], None]], None]:
    def work(number: int, advance: Callable[[int], None]) -> None:
        # The later, the sooner.
        time.sleep(0.02 * (10 - number))
        if number in failing:
            raise ValueError(f"task {number}") if number % 2 else FileNotFoundError(2, "task", str(number))

    return work


def make_deadly() -> Callable[[int, Callable[[int], None]], None]:
    def work(number: int, advance: Callable[[int], None]) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    return work


def make_slowly(folder: Path) -> Callable[[int, Callable[[int], None]], None]:
    """Work that is known by a file for each process that will do it, when there is a file `go`."""
    (folder / f"process-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)

    def work(number: int, advance: Callable[[int], None]) -> None:
        (folder / str(number)).touch()
        advance(number)

    return work


def run_slowly(folder: Path) -> None:
    run_all(range(9), make_work=partial(make_slowly, folder), workers=2, advance=print)


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_every_task_is_done_once_and_tells_how_much(workers: int, tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    done: list[int] = []
    run_all(range(12), make_work=partial(make_work, tmp_path), workers=workers, advance=done.append)
    assert sorted(done) == list(range(12))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(12))
    processes = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert (os.getpid() in processes) == (workers == 1)
    assert set(multiprocessing.active_children()) == before


def test_no_task_is_no_work() -> None:
    run_all([], make_work=partial(make_failing, [0]), workers=4, advance=print)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_error_is_that_of_the_first_task_that_has_one(workers: int) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="task 3"):
        run_all(range(9), make_work=partial(make_failing, [3, 5, 6]), workers=workers, advance=print)
    with pytest.raises(FileNotFoundError) as error:
        run_all(range(9), make_work=partial(make_failing, [4, 5, 6]), workers=workers, advance=print)
    assert (error.value.errno, error.value.filename) == (2, "4")
    assert set(multiprocessing.active_children()) == before


def test_a_worker_that_is_killed_is_named_with_its_signal() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(ChildProcessError, match=r"workers: a process was ended \(SIGKILL\); give it more"):
        run_all(range(9), make_work=make_deadly, workers=2, advance=print)
    assert set(multiprocessing.active_children()) == before


def test_an_error_while_a_worker_begins_is_no_silence() -> None:
    with pytest.raises(ChildProcessError, match=r"exit code 1"):
        run_all(range(9), make_work=partial(int, "no number"), workers=2, advance=print)


def test_a_worker_whose_parent_was_killed_begins_no_task_that_it_was_given(tmp_path: Path) -> None:
    parent = start(run_slowly, tmp_path)
    while len(processes := list(tmp_path.glob("process-*"))) < 2:
        assert parent.is_alive()
        time.sleep(0.01)
    time.sleep(0.3)  # now the tasks are in the pipes
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    (tmp_path / "go").touch()
    until = time.monotonic() + 20
    while any(is_alive(int(path.name.removeprefix("process-"))) for path in processes):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "go", *processes])


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
