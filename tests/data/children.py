"""Prepares datasets in processes that may die of it."""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL
from pathlib import Path
from typing import Any

from sparsegate.data import TextOptions, prepare, spans
from sparsegate.data.normalization import PLAIN

_M_ARENA_MAX = -8  # of malloc.h
_context = multiprocessing.get_context("forkserver")
Options = dict[str, Any]
PLAIN.words("")  # its expression takes half a second to compile, once for all children


def start(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    process = _context.Process(target=target, args=args)
    process.start()
    return process


def ask(target: Callable[..., Any], *args: object) -> Any:
    """What `target` returns in a process of its own."""
    receiver, sender = _context.Pipe(duplex=False)
    process = start(_answer, sender, target, *args)
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


def _answer(sender: Any, target: Callable[..., Any], *args: object) -> None:
    sender.send(target(*args))


def make(options: Options) -> None:
    prepare(**options)


def make_and_die(options: Options, at_change: int) -> None:
    """Die of SIGKILL before the `at_change`-th change that the making brings to the disk."""
    die_at_change(at_change)
    prepare(**options)


def die_at_change(at_change: int) -> None:
    """From now on, die before the `at_change`-th file or folder is opened for writing, renamed or removed."""
    changes = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        opened_for_writing = event == "open" and args[2] & os.O_ACCMODE != os.O_RDONLY
        if opened_for_writing or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            changes += 1
            if changes == at_change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def peak_memory(options: Options) -> int:
    """The most memory, in bytes, that the process has held when the dataset is made of small reads."""
    with suppress(AttributeError):  # a C library without it
        CDLL(None).mallopt(_M_ARENA_MAX, 1)  # with several, how much they hold is a matter of luck
    os.environ["RAYON_NUM_THREADS"] = (
        "2"  # tokenizers takes as many as there are cores, and some MiB for each
    )
    spans.READ_BYTES = 1 << 15
    prepare(**options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def error_with_small_files(options: Options, limit: int) -> str:
    """The error when no file may be larger than `limit` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        prepare(**options)
    except OSError as error:
        return str(error)
    return ""


def many_parts(output: Path, source: Path, kind: str, *, workers: int) -> Options:
    """Some fifty parts of each text of a megabyte."""
    return {**options_for(output, source, kind), "workers": workers, "part_bytes": 20_000}


def options_for(output: Path, source: Path, kind: str) -> Options:
    size = {"subwords": 400}.get(kind)
    return {
        "output": output,
        "train": [source],
        "vocabulary": kind,
        "vocabulary_size": size,
        "valid_share": 0.1,
        "test_share": 0.1,
        "text": TextOptions(keep_blank_lines=True),
    }
