"""Whole sweeps over tiny shapes, their tables and their picture."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from sparsegate.benchmarking import contestants, peers, sweep
from sparsegate.benchmarking import shape as module
from sparsegate.benchmarking.contestants import admit
from sparsegate.benchmarking.layer import Batch, Contestant, own_experts
from sparsegate.benchmarking.memory import STATUS, memory_bytes
from sparsegate.benchmarking.peers import Absent, Request, peers_of
from sparsegate.benchmarking.plot import draw, spread
from sparsegate.benchmarking.report import tables
from sparsegate.benchmarking.shape import Shape
from sparsegate.benchmarking.sweep import Experiment, measure
from sparsegate.moe.layer import MoE

SHAPE = Shape(tokens=12, width=8, hidden=16, experts=4, k=2, dtype="float32")
SWEEPS = {
    "layer": [SHAPE, replace(SHAPE, experts=8)],
    "tokens": [SHAPE, replace(SHAPE, tokens=24)],
    "small-batch": [replace(SHAPE, tokens=1), SHAPE],
}


def small(peer_name: str = "transformers small") -> Callable[[Request], Iterator[Contestant]]:
    """Builds ours under another name, counting one of the two experts."""
    return lambda request: iter(
        [replace(own_experts(request.shape, request.moe), name=peer_name, pairs_per_token=1)]
    )


@pytest.fixture(params=SWEEPS)
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict:
    def absent(request: Request) -> Iterator[Absent]:
        raise ModuleNotFoundError("No module named 'x'", name="x")

    packages = {"transformers": small(), "st-moe-pytorch": absent}
    monkeypatch.setattr(sweep, "PACKAGES", packages)
    monkeypatch.setattr(peers, "PACKAGES", packages)
    experiment = Experiment(
        name=request.param,
        shapes=SWEEPS[request.param],
        training=request.param != "small-batch",
        repeats=2,
        peers=True,
        davidmrau=None,
        memory=False,
        buffer_bytes=1 << 20,
    )
    return {"threads": 1, "processor": "some", **measure(experiment, say=lambda text: None)}


def test_every_shape_has_everyone_the_least_time_and_the_reasons(results: dict):
    sink = ["sparsegate sink"] if results["training"] else []
    names = ["dense", "sparsegate experts", *sink, "sparsegate layer", "plain loop", "transformers small"]
    assert [row["name"] for row in results["rows"]] == 2 * names
    assert [row["rate"] for row in results["rows"] if row["name"] == "dense"] == [1.0, 1.0]
    assert all(row["milliseconds"] > 0 for row in results["rows"])
    assert all(row["rate_overlapped"] >= row["rate_in_turn"] > 0 for row in results["least"])
    assert [absent["name"] for absent in results["absent"]] == 2 * ["st-moe-pytorch"]
    assert len(results["parts"]) == (8 if results["training"] else 0)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_operations_are_counted_by_the_experts_that_a_contestant_has(results: dict):
    for row in results["rows"]:
        operations = row["gflops"] * row["milliseconds"] * 1e6
        passes = 3 if results["training"] else 1
        one_expert = passes * 4 * row["tokens"] * SHAPE.width * SHAPE.hidden
        assert operations == pytest.approx(row["experts_per_token"] * one_expert)


def test_the_tables_tell_all_numbers_notes_and_reasons(results: dict):
    text = tables(results)
    milliseconds = text.split("### Milliseconds")[1].split("###")[0]
    for row in [*results["rows"], *results["parts"]]:
        assert f"{row['milliseconds']:.3g}" in milliseconds
        assert f"| {row['name']} |" in milliseconds
    assert all(f"- {name}: {note}" in text for name, note in results["notes"].items())
    assert re.search(
        r"^- st-moe-pytorch: not installed \(x is missing\) \(\w+: \d+, \d+\)$", text, re.MULTILINE
    )


def test_the_picture_names_every_line(results: dict, tmp_path: Path):
    pictures = [tmp_path / "a.svg", tmp_path / "a.png"]
    draw([results, results], pictures)
    svg = pictures[0].read_text()
    assert all(name in svg for name in ("sparsegate experts", "sparsegate layer", "plain loop"))
    assert pictures[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("heights", [[], [0.5], [0.0, 0.0, 0.01], [0.1, 0.2, 0.9], [0.3] * 6])
def test_labels_stand_apart_in_their_order_and_not_below_the_axis(heights: list[float]):
    found = spread(heights, gap=0.05)
    assert len(found) == len(heights)
    assert all(b - a > 0.05 - 1e-9 for a, b in pairwise(found))
    assert all(height >= 0 for height in found)
    assert [f for f, h in zip(found, heights, strict=True) if h == 0.9] in ([], [0.9])


def test_a_peer_that_raises_is_absent_and_tells_why(shape: Shape, moe: MoE, batch: Batch):
    def broken(x_TD, routing):
        raise RuntimeError("two\nlines")

    peer = replace(own_experts(shape, moe), forward=broken)
    assert admit(peer, batch, shape, training=True) == Absent(peer.name, "RuntimeError: two lines")
    wrong = replace(peer, forward=lambda x_TD, routing: (2 * moe.experts(x_TD, routing), None))
    found = admit(wrong, batch, shape, training=True)
    assert isinstance(found, Absent)
    assert found.reason.startswith("WrongResult: output: differs from the formula by 1 of its norm")
    hindered = replace(peer, obstacle=lambda shape, training: "too slow")
    assert admit(hindered, batch, shape, training=True) == Absent(peer.name, "too slow")


def test_a_peer_that_does_not_fit_is_not_built(shape: Shape, moe: MoE, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 1)
    (absent,) = peers_of("transformers", Request(shape, moe, training=True, davidmrau=None))
    assert absent.reason.endswith("GB more memory, 0.0 GB are free")


@pytest.mark.skipif(not STATUS.exists(), reason="Linux tells it")
@pytest.mark.parametrize("name", ["dense", "sparsegate experts", "sparsegate sink", "plain loop"])
def test_the_forward_pass_keeps_rows_and_hidden_activations(name: str):
    shape = Shape(tokens=8192, width=64, hidden=512, experts=2, k=2, dtype="float32")
    found = memory_bytes(name, shape, davidmrau=None)
    hidden = shape.pairs * shape.hidden * shape.item_bytes
    assert hidden < found["kept"] < 3 * hidden
    assert found["peak"] > hidden


def test_who_is_looked_for_is_found_without_other_packages(
    shape: Shape, moe: MoE, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(contestants, "PACKAGES", {"transformers": None, "davidmrau": small("davidmrau")})
    monkeypatch.setattr(peers, "PACKAGES", contestants.PACKAGES)
    request = Request(shape, moe, training=True, davidmrau=None)
    for name in ("dense", "sparsegate layer", "davidmrau"):
        assert contestants.find(name, request).name == name
