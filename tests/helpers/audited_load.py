"""Load checkpoints while each act of the interpreter is watched: `audited_load.py FOLDER...` prints JSON.

With a pickle in the place of a folder, it is unpickled: what the watch must see.
"""

import json
import os
import pickle
import sys
import time
from contextlib import suppress
from pathlib import Path

from sparsegate.training.checkpoint import latest_checkpoint, load_checkpoint

HARMLESS = {"open", "os.listdir", "os.scandir", "object.__getattr__", "builtins.id", "sys._getframe"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

events: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    if event not in HARMLESS:
        events.append(f"{event} {arguments!r:.200}")
    elif event == "open" and arguments[2] & WRITING:
        events.append(f"open for writing {arguments[0]!r}")


def load(path: Path) -> str:
    """What comes of it: "loaded", or the exception."""
    try:
        if path.is_dir():
            with suppress(ValueError):
                latest_checkpoint(path, warn=lambda message: None)
            load_checkpoint(path / "step-00000001")
        else:
            pickle.loads(path.read_bytes())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def peak_mib() -> float:
    """The most memory that this process has held; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def seconds_of_a_million_additions() -> float:
    """Of this processor's time, which other work around it does not change as it does a clock's."""
    begin = time.process_time()
    total = 0
    for number in range(1_000_000):
        total += number
    return time.process_time() - begin


def main(whole: str, *paths: str) -> None:
    assert (
        load(Path(whole)) == "loaded"
    )  # so that what is imported on first use is there before the watch begins
    base = peak_mib()
    unit = seconds_of_a_million_additions()
    outcomes = {}
    sys.addaudithook(watch)
    for path in paths:
        events.clear()
        begin = time.process_time()
        outcome = load(Path(path))
        took = (time.process_time() - begin) / unit
        outcomes[path] = {"outcome": outcome, "events": list(events), "millions_of_additions": took}
    print(json.dumps({"outcomes": outcomes, "grown_mib": peak_mib() - base}))


if __name__ == "__main__":
    main(*sys.argv[1:])
