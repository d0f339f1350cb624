"""The picture of one or more sweeps, a panel each. It needs matplotlib, which the extra `plots` brings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Results

INK, FAINT, GRID, ROOF = "#334155", "#94a3b8", "#e2e8f0", "#f1f5f9"
COLORS = {  # by the first word of a name
    "sparsegate": "#c2410c",
    "transformers": "#2563eb",
    "mixture-of-experts": "#0d9488",
    "st-moe-pytorch": "#7c3aed",
    "davidmrau": "#4d7c0f",
    "plain": "#64748b",
}
OURS = COLORS["sparsegate"]
DASHES = {"experts": "-", "sink": (0, (1, 1.2)), "layer": (0, (4, 1.6))}
STYLE = {"font.size": 10.5, "svg.hashsalt": "sparsegate", "svg.fonttype": "none"}
LABEL_GAP = 0.046  # of the height of a panel

_X_LABELS = {
    "layer": "number of experts",
    "tokens": "tokens per expert",
    "small-batch": "tokens in the batch",
}


class Line(NamedTuple):
    """One contestant's points, from left to right."""

    name: str
    kind: str
    xs: list[float]
    ys: list[float]

    @property
    def color(self) -> str:
        return COLORS[self.name.split()[0]]


def draw(sweeps: Sequence[Results], pictures: Sequence[Path]) -> None:
    """Write one picture, a panel for each sweep, in the formats that the file names say (.svg, .png)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 + 5.8 * len(sweeps), 5), layout="constrained")
        panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
        for axes, results in zip(panels, sweeps, strict=True):
            _draw_panel(axes, results)
        figure.suptitle(_title(sweeps[0]), x=0.01, ha="left", fontsize=12.5, color=INK)
        figure.supxlabel(_legend(sweeps[0]), x=0.01, ha="left", fontsize=9, color=INK, linespacing=1.4)
        for picture in pictures:
            metadata = {"Date": None} if picture.suffix == ".svg" else None
            figure.savefig(picture, metadata=metadata, dpi=160)


def _title(results: Results) -> str:
    return (
        "The rate of a sparse layer, as a share of a dense one's of the same multiply-adds"
        if results["training"]
        else "Few tokens: how fast the weights in use are read"
    )


def _legend(results: Results) -> str:
    what = "forward and backward, all gradients" if results["training"] else "forward"
    dotted = "dotted: the same, weight gradients dropped; " if results["training"] else ""
    lines = [
        f"solid: experts, routing given; {dotted}dashed: whole layer, with its gate",
        "shaded: the least time, arithmetic and traffic of the weights at once or in turn",
        f"{what}, {results['shapes'][0]['dtype']}, {results['threads']} threads, {results['processor']}",
    ]
    return "\n".join(lines if results["training"] else [lines[0], lines[2]])


def _draw_panel(axes: Axes, results: Results) -> None:
    lines = _lines(results)
    _draw_limits(axes, results)
    for line in lines:
        ours = line.color == OURS
        width, size, order = (2.4, 5.5, 4) if ours else (1.3, 3.5, 3)
        axes.plot(line.xs, line.ys, ls=DASHES[line.kind], color=line.color, lw=width, zorder=order)
        axes.plot(line.xs, line.ys, "o", color=line.color, ms=size, zorder=order)
    _scale(axes, results, sorted({x for line in lines for x in line.xs}))
    _label(axes, lines)


def _lines(results: Results) -> list[Line]:
    field = "rate" if results["training"] else "used_weights_gb_per_second"
    rows = [row for row in results["rows"] if row["kind"] in DASHES and row[field] is not None]
    return [
        Line(
            name,
            next(row["kind"] for row in rows if row["name"] == name),
            [_x(results, row) for row in rows if row["name"] == name],
            [row[field] for row in rows if row["name"] == name],
        )
        for name in dict.fromkeys(row["name"] for row in rows)
    ]


def _x(results: Results, row: Mapping[str, Any]) -> float:
    if results["sweep"] == "layer":
        return row["experts"]
    return (
        row["tokens"] * results["shapes"][0]["k"] / row["experts"] if results["training"] else row["tokens"]
    )


def _draw_limits(axes: Axes, results: Results) -> None:
    """The dense layer, and the band in which the least time lies; or the speed of the memory."""
    if not results["training"]:
        read = results["bandwidth"]["read"] / 1e9
        axes.axhline(read, color=INK, lw=1.2)
        _write_above(axes, f"reading memory, {read:,.0f} GB/s", read, side="right")
        return
    least = results["least"]
    xs = [_x(results, row) for row in least]
    in_turn, overlapped = ([row[f"rate_{how}"] for row in least] for how in ("in_turn", "overlapped"))
    axes.fill_between(xs, in_turn, overlapped, color=ROOF, zorder=1)
    axes.plot(xs, in_turn, color=FAINT, lw=1, zorder=2)
    axes.plot(xs, overlapped, color=FAINT, lw=1, zorder=2)
    axes.axhline(1, color=INK, lw=1.2, zorder=2)
    gflops = [row["gflops"] for row in results["rows"] if row["kind"] == "dense"]
    speed = f"{min(gflops):,.0f}" if len(gflops) == 1 else f"{min(gflops):,.0f} to {max(gflops):,.0f}"
    # Where fewer lines pass: rates fall with experts, and rise with the tokens of each.
    side = "left" if results["sweep"] == "tokens" else "right"
    _write_above(axes, f"dense layer, {speed} GFLOP/s", 1, side=side)


def _write_above(axes: Axes, text: str, y: float, *, side: Literal["left", "right"]) -> None:
    """A note on a horizontal line."""
    axes.annotate(
        text,
        (0.01 if side == "left" else 1, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha=side,
        fontsize=8.5,
        color=INK,
    )


def _scale(axes: Axes, results: Results, xs: Sequence[float]) -> None:
    shape = results["shapes"][0]
    fixed = f"{shape['tokens']:,} tokens" if results["sweep"] == "layer" else f"{shape['experts']:,} experts"
    sizes = f"width {shape['width']:,}, hidden {shape['hidden']:,}, k = {shape['k']}"
    axes.set_title(f"{fixed}, {sizes}", loc="left", fontsize=10, color=INK)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:,.4g}" if x < 1 else f"{x:,.0f}" for x in xs])
    axes.minorticks_off()
    axes.set_xlabel(_X_LABELS[results["sweep"]], color=INK)
    axes.set_ylim(0, 1.05 * max(1.05, axes.dataLim.y1) if results["training"] else None)
    axes.set_ylabel("share of the dense rate" if results["training"] else "GB/s", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=GRID, zorder=0)
    axes.set_axisbelow(True)


def _label(axes: Axes, lines: Sequence[Line]) -> None:
    """Each line's name at its right end, moved apart where they would cover each other.

    Names are longer than the steps from one end to the next, so that all of them share the height.
    """
    top = axes.get_ylim()[1]
    ordered = sorted(lines, key=lambda line: line.ys[-1])
    heights = spread([line.ys[-1] / top for line in ordered], gap=LABEL_GAP)
    for line, height in zip(ordered, heights, strict=True):
        axes.annotate(
            line.name,
            (line.xs[-1], height * top),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=line.color,
            fontweight="bold" if line.color == OURS else "normal",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
            zorder=5,
        )


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Ascending heights from 0 to 1, moved as little as needed to stand `gap` apart, and not below 0.

    >>> [round(height, 2) for height in spread([0.1, 0.11, 0.5], gap=0.1)]
    [0.06, 0.16, 0.5]
    """
    groups: list[list[float]] = []  # of heights that touch, each spread around its middle
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _bottom(groups[-2], gap) + len(groups[-2]) * gap:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + number * gap for group in groups for number in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return max(0.0, sum(group) / len(group) - gap * (len(group) - 1) / 2)
