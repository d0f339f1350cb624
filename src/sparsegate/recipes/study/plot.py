"""The pictures of a study: figures 2 and 3 of the paper. They need matplotlib, of the extra `plots`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ...benchmarking.plot import FAINT, GRID, INK, OURS, STYLE, spread
from .results import Kind, Row

COLORS: dict[Kind, str] = {"dense": INK, "flat mixture": "#2563eb", "hierarchical mixture": OURS}
MARKERS: dict[Kind, str] = {"dense": "s", "flat mixture": "o", "hierarchical mixture": "o"}
_LABEL_GAP = 0.05  # of the height of a panel
_LEAST_RANGE = 8.0  # of the horizontal axis, from end to end
_LOGARITHMIC = 2.5


def draw(rows: Sequence[Row], *, title: str, folder: Path) -> list[Path]:
    """Write `figure2` and `figure3` as SVG and PNG, and return their paths; nothing without a row."""
    if not rows:
        return []
    last = [row for row in rows if row.budget == max(row.budget for row in rows)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _against_parameters(left, [[row for row in last if row.equal_cost]])
        _against_computation(right, last)
        _name(left, [row for row in last if row.equal_cost], _parameters)
        _name(right, last, _computation)
        _frame(figure, left, title, f"after {_millions(last[0].words)} words", last)
        figure2 = _save(figure, folder / "figure2")
        budgets = sorted({row.budget for row in rows})
        series = [[row for row in rows if row.budget == budget and row.equal_cost] for budget in budgets]
        gains = [[row for row in some if row.kind != "dense" and row.against_dense] for some in series]
        panels = 2 if any(gains) else 1
        figure = Figure(figsize=(4 + 3.75 * panels, 5.4), layout="constrained")
        left, *right = figure.subplots(1, panels, squeeze=False)[0]
        _against_parameters(left, series)
        for axes in right:
            _beside_dense(axes, gains)
        _frame(figure, left, title, "a line for each budget of words", rows)
        return [*figure2, *_save(figure, folder / "figure3")]


def _against_parameters(axes: Axes, series: Sequence[Sequence[Row]]) -> None:
    """Figure 2 left with one series, figure 3 with several: each is joined by a line."""
    for rows in series:
        mixtures = [(_parameters(row), row.perplexity) for row in rows if row.kind != "dense"]
        if mixtures:
            axes.plot(*zip(*mixtures, strict=True), color=FAINT, lw=1.4, zorder=1)
        for row in rows:
            _point(axes, _parameters(row), row.perplexity, row.low, row.high, row.kind)
    _scale(axes, "parameters (millions), without embedding and softmax")
    if len(series) > 1:
        for row in (rows[-1] for rows in series if rows):
            _note(axes, f"{_millions(row.words)} words", _parameters(row), row.perplexity)


def _beside_dense(axes: Axes, series: Sequence[Sequence[Row]]) -> None:
    """Figure 3 as what mixtures gain: perplexity over that of the best dense model of the same budget."""
    axes.axhline(0, color=INK, lw=1)
    for rows in filter(None, series):
        points = []
        for row in rows:
            assert row.against_dense is not None
            ratio = row.against_dense
            points.append((_parameters(row), _percent(ratio.mean)))
            _point(axes, *points[-1], _percent(ratio.low), _percent(ratio.high), row.kind)
        axes.plot(*zip(*points, strict=True), color=FAINT, lw=1.4, zorder=1)
        _note(axes, f"{_millions(rows[-1].words)} words", *points[-1])
    _scale(axes, "parameters (millions), without embedding and softmax", linear=True)
    axes.set_ylabel("test perplexity against the best dense model", color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}%" if value else "equal"))


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _against_computation(axes: Axes, rows: Sequence[Row]) -> None:
    """Figure 2 right: dense models joined by a line, and the largest mixtures of each cost by another."""
    best: dict[tuple[bool, int], Row] = {}
    for row in rows:
        key = (row.kind == "dense", round(row.ops_per_timestep / 1e5))
        if key not in best or row.perplexity < best[key].perplexity:
            best[key] = row
    for is_dense in (True, False):
        line = sorted((_computation(row), row.perplexity) for key, row in best.items() if key[0] == is_dense)
        if line:
            axes.plot(*zip(*line, strict=True), color=FAINT, lw=1.4, zorder=1)
    for row in rows:
        _point(axes, _computation(row), row.perplexity, row.low, row.high, row.kind)
    _scale(axes, "computation (million multiply-adds for each word, without softmax)")


def _parameters(row: Row) -> float:
    """In millions."""
    return row.parameters_without_embedding_and_softmax / 1e6


def _computation(row: Row) -> float:
    """In millions."""
    return row.ops_per_timestep / 1e6


def _point(axes: Axes, x: float, y: float, low: float, high: float, kind: Kind) -> None:
    axes.vlines(x, low, high, color=COLORS[kind], lw=1.6, zorder=2)
    axes.plot(x, y, MARKERS[kind], color=COLORS[kind], ms=6, zorder=3)


def _scale(axes: Axes, label: str, *, linear: bool = False) -> None:
    """Logarithmic from left to right; upwards as well, unless linear, where the greatest is several times as
    large as the least."""
    axes.margins(y=0.09)
    axes.autoscale_view()
    left, right = axes.dataLim.intervalx
    bottom, top = axes.dataLim.intervaly
    room = max(right / left, _LEAST_RANGE) ** 0.16
    axes.set_xscale("log")
    axes.set_xlim(left / room, right * room)
    if not linear and top > _LOGARITHMIC * bottom:
        axes.set_yscale("log")
        axes.set_ylim(bottom / 1.1, top * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel(label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, which="both")
    axes.grid(axis="y", color=GRID, zorder=0, which="major")
    axes.set_axisbelow(True)


def _name(axes: Axes, rows: Sequence[Row], x_of: Callable[[Row], float]) -> None:
    """Each model's name beside its point, those of about one place moved apart; the axes stay as they are."""
    points = [axes.transData.transform((x_of(row), row.perplexity)) for row in rows]
    places = [axes.transAxes.inverted().transform(point) for point in points]
    columns: dict[int, list[int]] = {}
    for index, place in enumerate(places):
        columns.setdefault(round(place[0] * 12), []).append(index)
    for indices in columns.values():
        indices.sort(key=lambda index: places[index][1])
        heights = spread([places[index][1] for index in indices], gap=_LABEL_GAP)
        for index, height in zip(indices, heights, strict=True):
            axes.annotate(
                rows[index].model.removeprefix("small-").removeprefix("news-"),
                (places[index][0], height),
                xycoords="axes fraction",
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=COLORS[rows[index].kind],
                annotation_clip=False,
            )


def _note(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=INK,
        annotation_clip=False,
    )


def _frame(figure: Figure, axes: Axes, title: str, what: str, rows: Sequence[Row]) -> None:
    axes.set_ylabel("test perplexity per word", color=INK)
    figure.suptitle(f"{title}, {what}", x=0.01, ha="left", fontsize=12.5, color=INK)
    for kind, color in COLORS.items():
        if any(row.kind == kind for row in rows):
            axes.plot([], [], MARKERS[kind], color=color, ms=6, label=kind)
    # Below: within a panel it would lie on some interval.
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower right",
        ncols=len(labels),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    over = {f"over {len(row.seeds)} seeds" if len(row.seeds) > 1 else "over test text" for row in rows}
    figure.supxlabel(
        f"bars: 95% intervals, {' or '.join(sorted(over))}", x=0.01, ha="left", fontsize=9, color=INK
    )


def _millions(words: int) -> str:
    return f"{words / 1e6:,.3g} million" if words >= 1e5 else f"{words:,}"


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in paths:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=160)
    return paths
