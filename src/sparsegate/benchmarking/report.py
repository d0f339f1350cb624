"""Results as tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from .measuring import markdown

Results = Mapping[str, Any]

_KINDS = {
    "limit": "at best",
    "dense": "dense layer",
    "experts": "experts, routing given",
    "sink": "the same, weight gradients dropped",
    "layer": "whole layer",
    "part": "a part of it",
}


def tables(results: Results) -> str:
    """Everything that was measured, for people."""
    return "\n\n".join([_heading(results), *_sections(results), *_endnotes(results)])


def _heading(results: Results) -> str:
    shape, bandwidth = results["shapes"][0], results["bandwidth"]
    what = (
        "forward and backward, all gradients"
        if results["training"]
        else "forward alone, weights not in the caches"
    )
    speeds = {name: f"{value / 1e9:.3g}" for name, value in bandwidth.items()}
    return (
        f"Width {shape['width']:,}, hidden {shape['hidden']:,}, k = {shape['k']}, {shape['dtype']}; {what}; "
        f"medians of {results['repeats']} rounds.\n"
        f"Memory: {speeds['read']} GB/s to read, {speeds['write']} to write, "
        f"{speeds['fresh_write']} to write what was just allocated."
    )


def _sections(results: Results) -> list[str]:
    rows, parts = results["rows"], results["parts"]
    milliseconds = pivot(results, [*rows, *parts], "milliseconds")
    if not results["training"]:
        read = {"name": "reading memory", "kind": "limit", "value": results["bandwidth"]["read"] / 1e9}
        limits = [{**where(row), **read} for row in results["least"]]
        rates = pivot(results, [*limits, *_renamed(rows, "used_weights_gb_per_second")], "value")
        return [
            _section("Milliseconds per call", milliseconds),
            _section("GB/s of the weights in use", rates),
        ]
    limits = [
        {**where(row), "name": name, "kind": "limit", "value": row[f"rate_{field}"]}
        for field, name in (
            ("overlapped", "arithmetic and weights at once"),
            ("in_turn", "arithmetic, then weights"),
        )
        for row in results["least"]
    ]
    sections = [
        _section(
            "Rate: the dense layer's time over that of each",
            pivot(results, [*limits, *_renamed(rows, "rate")], "value"),
        ),
        _section("Milliseconds", milliseconds),
    ]
    for field, title in (
        ("kept_bytes", "Memory kept from forward to backward, MB"),
        ("peak_bytes", "Peak of memory beyond weights and gradients, MB"),
    ):
        measured = [{**row, "value": row[field] / 1e6} for row in rows if row[field] is not None]
        if measured:
            sections.append(_section(title, pivot(results, measured, "value")))
    return sections


def pivot(results: Results, rows: Sequence[Mapping[str, Any]], field: str) -> list[dict[str, Any]]:
    """A line for each name that has values, a column for each shape; None where there is no such row."""
    axis = axis_of(results)
    kinds = {row["name"]: row["kind"] for row in rows}
    names = sorted(kinds, key=lambda name: list(_KINDS).index(kinds[name]))
    values = {(row["name"], row[axis]): row[field] for row in rows}
    columns = list(dict.fromkeys(shape[axis] for shape in results["shapes"]))
    lines = [
        {axis: name, "computes": _KINDS[kinds[name]]}
        | {f"{column:,}": values.get((name, column)) for column in columns}
        for name in names
    ]
    return [line for line in lines if any(value is not None for value in list(line.values())[2:])]


def axis_of(results: Results) -> str:
    """What changes from column to column."""
    return "experts" if results["sweep"] == "layer" else "tokens"


def where(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"experts": row["experts"], "tokens": row["tokens"]}


def _renamed(rows: Sequence[Mapping[str, Any]], field: str) -> list[dict[str, Any]]:
    return [{**row, "value": row[field]} for row in rows]


def _section(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"### {title}\n\n{markdown(rows)}"


def _endnotes(results: Results) -> list[str]:
    """What each computes, and who is absent where, and why."""
    notes = [f"- {name}: {note}" for name, note in results["notes"].items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    axis = axis_of(results)
    for absent in results["absent"]:
        reasons.setdefault((absent["name"], absent["reason"]), []).append(f"{absent[axis]:,}")
    missing = [
        f"- {name}: {reason} ({axis}: {', '.join(columns)})" for (name, reason), columns in reasons.items()
    ]
    found = ["### What they compute\n\n" + "\n".join(notes)]
    return found + (["### Not timed\n\n" + "\n".join(missing)] if missing else [])
