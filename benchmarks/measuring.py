"""What the benchmarks share: interleaved timing, and results with their circumstances."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def seconds(functions: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Times of each function, called in turn so that a drift of the machine meets all of them alike.

    The first call of each is a warm-up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_number:
                times[name].append(time.perf_counter() - started)
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def circumstances() -> dict[str, Any]:
    """What a figure depends on, beside the code."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def store(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows and circumstances to `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**circumstances(), "rows": rows}, indent=2) + "\n")
    return path


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table; floats with three digits."""
    shown = [
        [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [list(rows[0]), ["---"] * len(rows[0]), *shown])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
