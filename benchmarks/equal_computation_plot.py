"""The picture of `benchmarks.equal_computation`: test perplexity against parameters, as in figure 2, left.

python -m benchmarks.equal_computation_plot RUNS/results.json docs/images/equal_computation.svg
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
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    rows = [row for file in args.results for row in json.loads(file.read_text())]
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "sparsegate", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    draw(axes, rows)
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
    axes.set_xlim(0.4, 40)
    axes.margins(y=0.15)
    axes.set_xlabel("parameters without embedding and softmax (millions)")
    axes.set_ylabel("test perplexity per word")
    axes.set_title("The same words, and about the same multiply-adds for each", loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0", zorder=0)


def mean(row: dict) -> float:
    return statistics.mean(run["test_word_perplexity"] for run in row["runs"])


def is_sparse(row: dict) -> bool:
    """Whether the row has a gate, and so balance metrics."""
    return any(run["balance"] for run in row["runs"])


if __name__ == "__main__":
    main()
