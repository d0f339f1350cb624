"""The picture of `benchmarks.equal_computation`: test perplexity against parameters, as in figure 2, left.

python -m benchmarks.equal_computation_plot STREAMS/results.json SENTENCES/results.json \\
    --titles "continuous text" "single sentences" --picture docs/images/equal_computation.svg
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

SPARSE, DENSE = "#c2410c", "#334155"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="a panel for each")
    parser.add_argument("--titles", nargs="+", required=True)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "sparsegate", "svg.fonttype": "none"})
    figure, panels = plt.subplots(
        1, len(args.results), figsize=(4.6 * len(args.results), 4.2), sharey=True, squeeze=False
    )
    figure.set_layout_engine("constrained")
    figure.suptitle(
        "The same words, and about the same multiply-adds for each", x=0.01, ha="left", fontsize=12
    )
    panels[0, 0].set_ylabel("test perplexity per word")
    for axes, file, title in zip(panels[0], args.results, args.titles, strict=True):
        draw(axes, json.loads(file.read_text()))
        axes.set_title(title, loc="left", fontsize=11)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, metadata={"Date": None} if args.picture.suffix == ".svg" else None)


def draw(axes: Axes, rows: list[dict]) -> None:
    """One point a model, its seeds as a bar; the mixtures are joined by a line."""
    mixtures = sorted(
        (row["parameters_without_embedding_and_softmax"] / 1e6, mean(row)) for row in rows if is_sparse(row)
    )
    axes.plot(*zip(*mixtures, strict=True), color=SPARSE, linewidth=1.5, zorder=1)
    for number, row in enumerate(sorted(rows, key=mean)):
        parameters = row["parameters_without_embedding_and_softmax"] / 1e6
        values = [run["test_word_perplexity"] for run in row["runs"]]
        color = SPARSE if is_sparse(row) else DENSE
        axes.vlines(parameters, min(values), max(values), color=color, linewidth=2)
        axes.plot(parameters, mean(row), "o", color=color, markersize=7)
        below = is_sparse(row) or number % 2 == 0
        axes.annotate(
            row["name"].removeprefix("small-"),
            (parameters, mean(row)),
            xytext=(8, -12 if below else 6),
            textcoords="offset points",
            color=color,
        )
    axes.set_xscale("log")
    axes.set_xlim(0.4, 6)
    axes.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set_xlabel("parameters (millions), without embedding and softmax")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0", zorder=0)


def mean(row: dict) -> float:
    return statistics.mean(run["test_word_perplexity"] for run in row["runs"])


def is_sparse(row: dict) -> bool:
    """Whether the row has a gate, and so balance metrics."""
    return any(run["balance"] for run in row["runs"])


if __name__ == "__main__":
    main()
