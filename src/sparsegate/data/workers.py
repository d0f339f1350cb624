"""Tasks done by several processes, with the same result and the same error as by one."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TypeVar

Task = TypeVar("Task")
Advance = Callable[[int], None]
Work = Callable[[Task, Advance], None]


def run_all(
    tasks: Sequence[Task], *, make_work: Callable[[], Work[Task]], workers: int, advance: Advance
) -> None:
    """Do all `tasks` in `workers` processes, in this one if `workers` is 1; they begin in order.

    make_work: called once in each process; what it returns is called with a task and with a function to tell
        how much of it is done, which `advance` here is told.

    ValueError or OSError of the first task, in their order, that raises one. ChildProcessError if a process
    was killed. A process whose parent was killed ends before its next task, or when it next tells how much of
    one is done.
    """
    if min(workers, len(tasks)) <= 1:
        work = make_work()
        for task in tasks:
            work(task, advance)
        return
    crew = [_Worker(make_work) for _ in range(min(workers, len(tasks)))]
    try:
        _hand_out(tasks, crew, advance)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process that does one task after the other."""

    def __init__(self, make_work: Callable[[], Work[Task]]) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_work), daemon=True)
        self._process.start()
        theirs.close()

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    def cause_of_death(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _hand_out(tasks: Sequence[Task], crew: Sequence[_Worker], advance: Advance) -> None:
    waiting = list(enumerate(tasks))[::-1]
    errors: dict[int, Exception] = {}
    busy: dict[Connection, int] = {}
    worker_of = {worker.connection: worker for worker in crew}

    def hand_out(connection: Connection) -> None:
        if waiting:
            busy[connection], task = waiting.pop()
            with suppress(BrokenPipeError):  # it died, and the pipe's end will say so
                connection.send(task)

    for worker in crew:
        hand_out(worker.connection)
    # Tasks begin in order, so that all before the first that fails have begun when its error is known.
    while any(number < min(errors, default=len(tasks)) for number in busy.values()):
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            try:
                done, error = connection.recv()
            except (EOFError, ConnectionResetError):
                cause = worker_of[connection].cause_of_death()
                cure = "give it more memory or fewer workers; what is done is kept for the same command"
                raise ChildProcessError(f"workers: a process was ended ({cause}); {cure}") from None
            if done is not None:
                advance(done)
                continue
            number = busy.pop(connection)
            if error is not None:
                errors[number] = error
                waiting.clear()
            hand_out(connection)
    if errors:
        raise errors[min(errors)]


def _serve(connection: Connection, make_work: Callable[[], Work[Task]]) -> None:
    """What a process of the crew does. It sends (how much is done, None) or (None, the task's error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        work = make_work()
        while True:
            task = connection.recv()
            # No other task comes before this one is done: what can be read is the end of a parent that was
            # killed, and whose work another command may have taken up by now.
            if connection.poll():
                return
            try:
                work(task, lambda done: connection.send((done, None)))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (ValueError, OSError) as error:
                connection.send((None, error))
            else:
                connection.send((None, None))
