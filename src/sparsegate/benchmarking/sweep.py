"""All contestants on a list of shapes: checked, timed in turn, set beside the least time of the machine."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..moe.layer import MoE
from .checks import check, check_layer
from .contestants import admit, own
from .layer import Batch, Contestant, make_batch, make_layer, parts, plain_loop, release, train_step
from .measuring import median_ratio, seconds
from .memory import memory_bytes
from .peers import PACKAGES, Absent, Request, peers_of
from .roofline import Bandwidth, least_time, measure_bandwidth
from .shape import Shape, require_memory

LARGER_THAN_CACHES = 1 << 29  # bytes

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is measured.

    shapes: those of one number of experts stand together, and share weights. training: forward and backward
    with all gradients, else forward alone in evaluation mode, with caches that hold none of the weights.
    repeats: rounds. peers: also time a plain loop and other packages. davidmrau: path of that peer's file, or
    None. memory: also measure memory. buffer_bytes: of the buffer that bandwidth is measured with, larger
    than all caches.

    Raises:
        ValueError: repeats of 0, or a shape that does not fit into memory.
    """

    name: str
    shapes: Sequence[Shape]
    training: bool
    repeats: int
    peers: bool
    davidmrau: Path | None
    memory: bool
    buffer_bytes: int = LARGER_THAN_CACHES

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats ({self.repeats}) must be at least 1")
        for shape in self.shapes:
            require_memory(shape, training=self.training)


def measure(experiment: Experiment, say: Say) -> dict[str, Any]:
    """Results as plain values, for the tables, the plot and JSON. say: is told what is being done.

    Raises:
        WrongResult: ours does not compute what the paper says.
    """
    say("memory bandwidth")
    bandwidth = measure_bandwidth(experiment.buffer_bytes)
    results: dict[str, Any] = {
        "sweep": experiment.name,
        "training": experiment.training,
        "repeats": experiment.repeats,
        "shapes": [asdict(shape) for shape in experiment.shapes],
        "bandwidth": asdict(bandwidth),
        "notes": {},
        "rows": [],
        "parts": [],
        "least": [],
        "absent": [],
    }
    for _, group in groupby(experiment.shapes, key=lambda shape: shape.experts):
        shapes = list(group)
        _measure_experts(experiment, shapes, bandwidth, results, say)
        if experiment.memory:
            _measure_memory(experiment, shapes, results["rows"], say)
    return results


def _measure_experts(
    experiment: Experiment, shapes: Sequence[Shape], bandwidth: Bandwidth, results: dict[str, Any], say: Say
) -> None:
    """All shapes of one number of experts; adds to the results."""
    say(f"{shapes[0].experts:,} experts: weights")
    torch.manual_seed(0)
    moe = make_layer(shapes[0]).train(experiment.training)
    ours = own(shapes[0], moe)
    request = Request(shapes[0], moe, experiment.training, experiment.davidmrau)
    peers: list[Contestant | Absent] = []
    if experiment.peers:
        peers += [plain_loop(shapes[0], moe)]
        peers += [peer for package in PACKAGES for peer in peers_of(package, request)]
    for shape in shapes:
        where = {"experts": shape.experts, "tokens": shape.tokens}
        batch = make_batch(shape, moe)
        say(f"{shape.experts:,} experts, {shape.tokens:,} tokens: checking")
        check_layer(moe, batch, training=experiment.training)
        for contestant in ours:
            check(contestant, batch, training=experiment.training)
        found = [admit(peer, batch, shape, training=experiment.training) for peer in peers]
        present = [*ours, *(peer for peer in found if isinstance(peer, Contestant))]
        say(f"{shape.experts:,} experts, {shape.tokens:,} tokens: timing")
        times = _time(experiment, moe, batch, present)
        results["rows"] += [where | _row(experiment, shape, batch, one, times) for one in present]
        results["least"].append(where | _least(experiment, shape, batch, bandwidth, times["dense"]))
        results["absent"] += [where | absent._asdict() for absent in found if isinstance(absent, Absent)]
        results["notes"] |= {contestant.name: contestant.note for contestant in present}
        results["parts"] += [
            where | {"name": name, "kind": "part", "milliseconds": 1e3 * statistics.median(times[name])}
            for name in list(times)[len(present) :]
        ]


def _time(
    experiment: Experiment, moe: MoE, batch: Batch, present: Sequence[Contestant]
) -> Mapping[str, list[float]]:
    """Seconds of everyone in every round; in training also of the parts of routing."""
    if experiment.training:
        steps = {contestant.name: partial(_step, contestant, batch) for contestant in present}
        return seconds({**steps, **parts(moe, batch)}, repeats=experiment.repeats)
    buffer = torch.ones(experiment.buffer_bytes // 4)
    with torch.no_grad():
        calls = {one.name: partial(one.forward, batch.x_TD, batch.routing) for one in present}
        return seconds(calls, repeats=experiment.repeats, before=lambda: buffer.add_(1.0))


def _step(contestant: Contestant, batch: Batch) -> None:
    train_step(contestant, batch)
    release(contestant, batch)


def _row(
    experiment: Experiment,
    shape: Shape,
    batch: Batch,
    contestant: Contestant,
    times: Mapping[str, list[float]],
) -> dict[str, Any]:
    """rate: the share of the dense layer's operations per second, counting its own experts per token."""
    own_times, k = times[contestant.name], contestant.pairs_per_token
    median = statistics.median(own_times)
    used_bytes = _num_used(batch) * shape.expert_bytes if contestant.uses_given_experts else None
    return {
        "name": contestant.name,
        "kind": contestant.kind,
        "experts_per_token": k,
        "milliseconds": 1e3 * median,
        "gflops": shape.flops(pairs_per_token=k, training=experiment.training) / median / 1e9,
        "rate": median_ratio(times["dense"], own_times) * k / shape.k,
        "used_weights_gb_per_second": None if used_bytes is None else used_bytes / median / 1e9,
        "kept_bytes": None,
        "peak_bytes": None,
    }


def _least(
    experiment: Experiment, shape: Shape, batch: Batch, bandwidth: Bandwidth, dense_times: Sequence[float]
) -> dict[str, float]:
    least = least_time(
        dense_seconds=statistics.median(dense_times),
        used_weight_bytes=_num_used(batch) * shape.expert_bytes,
        gradient_bytes=shape.weight_bytes,
        training=experiment.training,
        bandwidth=bandwidth,
    )
    return {
        "arithmetic_milliseconds": 1e3 * least.arithmetic,
        "traffic_milliseconds": 1e3 * least.traffic,
        "rate_overlapped": least.arithmetic / least.overlapped,
        "rate_in_turn": least.arithmetic / least.in_turn,
    }


def _num_used(batch: Batch) -> int:
    """Experts that some token goes to."""
    return batch.routing.expert_N.unique().numel()


def _measure_memory(
    experiment: Experiment, shapes: Sequence[Shape], rows: Sequence[dict[str, Any]], say: Say
) -> None:
    """Fill in what those who were timed take."""
    for shape in shapes:
        for row in rows:
            if (row["experts"], row["tokens"]) == (shape.experts, shape.tokens):
                say(f"{shape.experts:,} experts, {shape.tokens:,} tokens: memory of {row['name']}")
                found = memory_bytes(row["name"], shape, davidmrau=experiment.davidmrau)
                row["kept_bytes"], row["peak_bytes"] = found.get("kept"), found.get("peak")
