"""What all benchmarks share: interleaved timing, and results with their circumstances."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def seconds(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times of each function, called in turn so that a drift of the machine meets all of them alike.

    The first call of each is a warm-up and is not counted. before: called before each call, and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            before()
            started = time.perf_counter()
            function()
            if round_number:
                times[name].append(time.perf_counter() - started)
    return times


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def circumstances() -> dict[str, Any]:
    """What a figure depends on, beside the code.

    `commit` is None outside a checkout of this project, `version` in a checkout that is not installed.
    """
    return {
        "command": _command(sys.orig_argv),
        "version": _version(),
        "commit": _commit(Path(__file__)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def store(path: Path, results: Mapping[str, Any]) -> Path:
    """Write results as JSON; the folder is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return path


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table under the keys of the first; floats with three digits, None as an empty cell."""
    cells = [[_shown(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def _command(argv: Sequence[str]) -> str:
    """The command as one would type it: without the folders of the interpreter and of a script."""
    interpreter, *words = argv
    if words and not words[0].startswith("-"):
        return " ".join([Path(words[0]).name, *words[1:]])
    return " ".join([Path(interpreter).name, *words])


def _version() -> str | None:
    try:
        return version("sparsegate")
    except PackageNotFoundError:
        return None


def _commit(file: Path) -> str | None:
    """The commit that a file is tracked in. An installed copy may lie inside a checkout of something else."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=file.parent)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    return git("describe", "--always", "--dirty")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
