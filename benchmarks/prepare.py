"""Megabytes per second and memory of preparing text by words, and whether kills and resumes change a byte.

    python -m benchmarks.prepare TEXT ... --megabytes 1000

The text is made of the lines of the given files, drawn again and again until there is enough, in shards.
It is prepared by each number of workers, and once more with that many kills at random moments, each followed
by the same command again; every dataset must have the same bytes before anything is reported.

MB/s: megabytes of text over the whole time of the command, which reads the text twice: to count its words,
and to encode them. peak PSS, RSS: of all processes together; RSS counts pages that they share several times.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsegate.benchmarking.measuring import markdown, store

SHARD_BYTES = 40_000_000
WATCHED_EVERY = 0.1


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        megabytes = make_text(folder / "text", args.texts, args.megabytes)
        rows = [one(folder, args, workers, megabytes, kills=0) for workers in args.workers]
        rows.append(one(folder, args, args.workers[-1], megabytes, kills=args.kills))
    assert len({row["sha256"] for row in rows}) == 1, "not the same bytes"
    print(markdown(rows))
    print(store("prepare", rows))


def make_text(folder: Path, texts: list[Path], megabytes: int) -> float:
    """Shards of shuffled lines, tokenised; how many megabytes they have."""
    folder.mkdir()
    lines = [line.split() for text in texts for line in text.read_text().splitlines() if line.split()]
    choose, written, shard = random.Random(0), 0, 0
    while written < megabytes * 1e6:
        with (folder / f"news.en-{shard:05}").open("w") as file:
            room = min(SHARD_BYTES, int(megabytes * 1e6) - written)
            while room > 0:
                room -= file.write(" ".join(choose.choice(lines)) + "\n")
        written += (folder / f"news.en-{shard:05}").stat().st_size
        shard += 1
    return written / 1e6


def one(
    folder: Path, args: argparse.Namespace, workers: int, megabytes: float, *, kills: int
) -> dict[str, object]:
    """Prepare once. With kills, the time is that of all attempts together."""
    output = folder / "dataset"
    command = [sys.executable, "-m", "sparsegate", "prepare", str(folder / "text"), "--output", str(output)]
    command += ["--tokenized", "--min-count", "3", "--workers", str(workers)]
    choose, watch, attempts = random.Random(0), Watch(), 0
    started = time.perf_counter()
    while not output.exists():
        after = choose.uniform(*args.kill_between) if attempts < kills else None
        watch.run(command, after)
        attempts += 1
    seconds = time.perf_counter() - started
    row = {
        "workers": workers,
        "kills": attempts - 1,
        "megabytes": round(megabytes),
        "seconds": seconds,
        "MB/s": megabytes / seconds,
        "MB/s per worker": megabytes / seconds / workers,
        "peak PSS, MB": watch.peak.pss / 1e6,
        "peak RSS, MB": watch.peak.rss / 1e6,
        "sha256": digest(output),
    }
    shutil.rmtree(output)
    return row


@dataclass(frozen=True)
class Memory:
    """Bytes of some processes together."""

    pss: int = 0
    rss: int = 0


class Watch:
    """Runs commands, and keeps the most memory that they held with all their children."""

    def __init__(self) -> None:
        self.peak = Memory()

    def run(self, command: list[str], kill_after: float | None) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = None if kill_after is None else time.monotonic() + kill_after
        while process.poll() is None:
            found = memory_of([process.pid, *descendants(process.pid)])
            self.peak = Memory(max(self.peak.pss, found.pss), max(self.peak.rss, found.rss))
            if until is not None and time.monotonic() > until:
                process.kill()
            time.sleep(WATCHED_EVERY)
        assert process.returncode in (0, -9), process.returncode


def descendants(parent: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def memory_of(processes: list[int]) -> Memory:
    pss = rss = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        pss += found["Pss"]
        rss += found["Rss"]
    return Memory(pss, rss)


def digest(folder: Path) -> str:
    """Of the names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--kill-between", nargs=2, type=float, default=[2, 20], help="seconds after the start"
    )
    parser.add_argument("--folder", type=Path, help="where the text is made (default: a temporary one)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
