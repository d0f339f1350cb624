"""One writer per run folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = "lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder, which exists, for one writer.

    The kernel takes the lock back however the process ends: a killed writer leaves the file, and no lock.

    Raises:
        ValueError: another process holds it; one line that names the folder and the process.
    """
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = " ".join(os.pread(descriptor, 200, 0).decode("utf-8", "replace").split())
            raise ValueError(
                f"{folder}: another process writes to this run ({holder}); stop it, or choose another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
