"""Memory of one forward and backward pass, in a process of its own.

    python -m sparsegate.benchmarking.memory '{"contestant": "dense", "shape": {...}, ...}'

kept: what the forward pass leaves behind for the backward pass, the output included. peak: the most that
was held at any moment beyond weights, batch and all gradients; where a gradient does not exist yet when the
peak is reached, its place is used by something else. Linux tells both in `/proc/self/status`; elsewhere
nothing is measured.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ..moe.kernels.memory import set_recycling
from .contestants import find
from .layer import backward, make_batch, make_layer, release, train_step
from .peers import Request
from .shape import Shape

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_bytes(contestant: str, shape: Shape, *, davidmrau: Path | None) -> dict[str, int]:
    """`kept` and `peak`, from a new process; empty where it cannot be measured."""
    request = {
        "contestant": contestant,
        "shape": asdict(shape),
        "davidmrau": None if davidmrau is None else str(davidmrau),
        "threads": torch.get_num_threads(),
    }
    # What is freed goes back to the system at once, and is not counted as held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(request)], capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    set_recycling(False)  # or what was freed would count as held, and what is used again as nothing
    shape = Shape(**request["shape"])
    print(json.dumps(measure(request["contestant"], shape, request["davidmrau"])))


def measure(name: str, shape: Shape, davidmrau: str | None) -> dict[str, int]:
    """In the present process."""
    torch.manual_seed(0)
    moe = make_layer(shape)
    batch = make_batch(shape, moe)
    file = None if davidmrau is None else Path(davidmrau)
    contestant = find(name, Request(shape, moe, training=True, davidmrau=file))
    train_step(contestant, batch)  # loads what is loaded once
    for leaf in (*contestant.parameters, batch.x_TD, batch.routing.weight_N):
        leaf.grad = torch.ones_like(leaf)
    try:
        held_with_gradients = _bytes("VmRSS")
        release(contestant, batch)
        held = _bytes("VmRSS")
        RESET.write_text("5")  # the peak begins anew
    except OSError:
        return {}
    y_TD, loss = contestant.forward(batch.x_TD, batch.routing)
    kept = _bytes("VmRSS") - held
    backward(y_TD, loss, batch)
    return {"kept": max(0, kept), "peak": max(0, _bytes("VmHWM") - held_with_gradients)}


def _bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
