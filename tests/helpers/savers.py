"""Processes that save or hold a lock until they are killed; a fork server imports torch once for all."""

import multiprocessing
import os
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

from sparsegate.training.checkpoint import latest_checkpoint, load_checkpoint
from sparsegate.training.lock import run_lock
from tests.helpers.checkpoints import save

NUMEL = 200_000


def fork_server() -> ForkServerContext:
    return multiprocessing.get_context("forkserver")


def save_for_ever(run: Path) -> None:
    """Resume from the latest checkpoint and save one after another; `completed` lists those that are done."""
    completed = os.open(run / "completed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with run_lock(run):
        latest = latest_checkpoint(run / "checkpoints")
        first = 0 if latest is None else load_checkpoint(latest).step + 1
        for step in count(first):
            save(run / "checkpoints", step, keep={step - 1}, numel=NUMEL)
            os.write(completed, b"%d\n" % step)


def hold_lock_for_ever(run: Path, connection: Connection) -> None:
    with run_lock(run):
        connection.send("held")
        connection.recv()
