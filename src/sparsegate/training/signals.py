"""SIGINT, SIGTERM and SIGUSR1 ask a run to save and leave; a second one ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests() -> Iterator[Callable[[], str]]:
    """Within the block, the yielded function tells the name of the signal that came, or "" before.

    In a thread other than the main one, where Python lets nobody handle signals, it always tells "".
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield lambda: received[0] if received else ""
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
