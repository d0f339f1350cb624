"""Checkpoints that are written while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType

from .ranks import in_a_thread


class Background:
    """One piece of work at a time beside this thread. What it raises is raised where it is waited for.

    As a context it is waited for at the end, also when an error ends the block, and then says nothing of its
    own errors.
    """

    def __init__(self) -> None:
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin the work, after what was begun before it."""
        self.finish()
        self._work = in_a_thread(work)

    def finish(self) -> None:
        """Wait for the work, if there is any; raises what it did."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._work is not None:
            wait([self._work])
