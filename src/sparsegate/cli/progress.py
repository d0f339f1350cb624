"""How far a verb is, on standard error: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int, int], None]

_SECONDS = 10.0


class NowAndThen:
    """Prints a line on standard error, but none sooner than ten seconds after the one before."""

    def __init__(self) -> None:
        self.began = self._told = time.monotonic()

    def tell(self, line: str) -> None:
        now = time.monotonic()
        if now - self._told >= _SECONDS:
            self._told = now
            print(line, file=sys.stderr, flush=True)

    def rate(self, done: int) -> float:
        """How much of it is done in a second."""
        return done / max(time.monotonic() - self.began, 1e-9)


@contextmanager
def counted(activity: str) -> Iterator[Advance]:
    """Of what is told how many are done, and of how many."""
    lines = NowAndThen()

    def tell(done: int, total: int) -> None:
        lines.tell(f"{activity}: {done:,} of {total:,}")

    with _shown(activity, [MofNCompleteColumn()], tell) as advance:
        yield advance


@contextmanager
def read_bytes() -> Iterator[Advance]:
    """Of what is told how many bytes are read, and of how many."""
    lines, before = NowAndThen(), None

    def tell(done: int, total: int) -> None:
        nonlocal before
        before = done if before is None else before  # what an earlier process has read is not this one's rate
        rate = decimal(int(lines.rate(done - before)))
        lines.tell(f"reading: {decimal(done)} of {decimal(total)}, {rate}/s")

    with _shown("reading", [DownloadColumn(), TransferSpeedColumn()], tell) as advance:
        yield advance


@contextmanager
def _shown(activity: str, how_much: list[ProgressColumn], tell: Advance) -> Iterator[Advance]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield tell
        return
    columns = (TextColumn(activity), BarColumn(), *how_much, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(activity, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
