"""The pictures of a study: figures 2 and 3 of the paper. They need matplotlib, of the extra `plots`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ...benchmarking.plot import FAINT, GRID, INK, OURS, STYLE, spread
from .results import Kind, Row

COLORS: dict[Kind, str] = {"dense": INK, "flat mixture": "#2563eb", "hierarchical mixture": OURS}
MARKERS: dict[Kind, str] = {"dense": "s", "flat mixture": "o", "hierarchical mixture": "o"}
_LABEL_GAP = 0.05  # of the height of a panel
_MARGIN = 0.09


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
        _frame(figure, left, title, f"after {_millions(last[0].words)} words", last)
        figure2 = _save(figure, folder / "figure2")
        figure = Figure(figsize=(7.5, 5.4), layout="constrained")
        axes = figure.subplots()
        budgets = sorted({row.budget for row in rows})
        series = [[row for row in rows if row.budget == budget and row.equal_cost] for budget in budgets]
        _against_parameters(axes, series)
        _frame(figure, axes, title, "a line for each budget of words", rows)
        return [*figure2, *_save(figure, folder / "figure3")]


def _against_parameters(axes: Axes, series: Sequence[Sequence[Row]]) -> None:
    """Figure 2 left with one series, figure 3 with several: each is joined by a line."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for rows in series:
        xs = [row.parameters_without_embedding_and_softmax / 1e6 for row in rows]
        mixtures = [(x, row.perplexity) for x, row in zip(xs, rows, strict=True) if row.kind != "dense"]
        if mixtures:
            axes.plot(*zip(*mixtures, strict=True), color=FAINT, lw=1.4, zorder=1)
        for x, row in zip(xs, rows, strict=True):
            _point(axes, x, row)
    _scale(axes, "parameters (millions), without embedding and softmax")
    if len(series) == 1:
        _name(axes, series[0], [row.parameters_without_embedding_and_softmax / 1e6 for row in series[0]])
        return
    for rows in filter(None, series):
        last = rows[-1]
        _note(
            axes, f"{_millions(last.words)} words", last.parameters_without_embedding_and_softmax / 1e6, last
        )


def _against_computation(axes: Axes, rows: Sequence[Row]) -> None:
    """Figure 2 right: dense models joined by a line, and the largest mixtures of each cost by another."""
    axes.set_xscale("log")
    best: dict[tuple[bool, int], Row] = {}
    for row in rows:
        key = (row.kind == "dense", round(row.ops_per_timestep / 1e5))
        if key not in best or row.perplexity < best[key].perplexity:
            best[key] = row
    for is_dense in (True, False):
        line = sorted(
            (row.ops_per_timestep / 1e6, row.perplexity) for key, row in best.items() if key[0] == is_dense
        )
        if line:
            axes.plot(*zip(*line, strict=True), color=FAINT, lw=1.4, zorder=1)
    for row in rows:
        _point(axes, row.ops_per_timestep / 1e6, row)
    _scale(axes, "computation (million multiply-adds for each word, without softmax)")
    _name(axes, rows, [row.ops_per_timestep / 1e6 for row in rows])


def _point(axes: Axes, x: float, row: Row) -> None:
    color = COLORS[row.kind]
    axes.vlines(x, row.low, row.high, color=color, lw=1.6, zorder=2)
    axes.plot(x, row.perplexity, MARKERS[row.kind], color=color, ms=6, zorder=3)


def _scale(axes: Axes, label: str) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:,.4g}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    axes.margins(x=0.12, y=_MARGIN)
    axes.set_xlabel(label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, which="both")
    axes.grid(axis="y", color=GRID, zorder=0, which="both")
    axes.set_axisbelow(True)


def _name(axes: Axes, rows: Sequence[Row], xs: Sequence[float]) -> None:
    """Each model's name beside its point, those of about one place moved apart."""
    places = [axes.transAxes.inverted().transform(axes.transData.transform(p)) for p in _points(rows, xs)]
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


def _points(rows: Sequence[Row], xs: Sequence[float]) -> list[tuple[float, float]]:
    return [(x, row.perplexity) for x, row in zip(xs, rows, strict=True)]


def _note(axes: Axes, text: str, x: float, row: Row) -> None:
    axes.annotate(
        text,
        (x, row.perplexity),
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
    axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)
    over = {f"over {len(row.seeds)} seeds" if len(row.seeds) > 1 else "over test text" for row in rows}
    figure.supxlabel(
        f"bars: 95% intervals, {' or '.join(sorted(over))}", x=0.01, ha="left", fontsize=9, color=INK
    )


def _millions(words: int) -> str:
    return f"{words / 1e6:,.3g} million"


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in paths:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=160)
    return paths
