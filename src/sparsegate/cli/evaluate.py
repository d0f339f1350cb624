"""`sparsegate evaluate`: how good a trained model is on held-out text."""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..evaluation import PARTS, Evaluation
from ..inspection.balance import balance_metrics
from ..recipes.load import LanguageRun
from .trained import add_run, load_run
from .verb import Parser, Verb

EXAMPLE = """
sparsegate evaluate runs/book
sparsegate evaluate runs/book --split valid --part second-half --json
sparsegate evaluate runs/book --data datasets/other --split test
"""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="another dataset than the run's, with the same vocabulary"
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "valid", "test"), help="of the dataset (default: test)"
    )
    parser.add_argument("--part", default="all", choices=PARTS, help="of the split (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="stretches read side by side (default: 16)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    trained = load_run(args)
    with _progress_bar() as progress:
        result = trained.evaluate(
            args.split, data=args.data, part=args.part, batch_size=args.batch_size, progress=progress
        )
    if not math.isfinite(result.nll_nats):
        raise ValueError(f"{args.run}: its likelihood is not finite; use an earlier checkpoint")
    if args.json:
        print(json.dumps(_as_json(args, trained, result), allow_nan=False))
    else:
        Console().print(_table(args, trained, result))
    return 0


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _as_json(args: Namespace, trained: LanguageRun, result: Evaluation) -> dict[str, object]:
    return {
        "run": str(args.run),
        "step": trained.step,
        "data": str(args.data or trained.config.data),
        "split": args.split,
        "part": args.part,
        "tokens": result.num_tokens,
        "sentences": result.num_sentences,
        "words": result.num_words,
        "bytes": result.num_bytes,
        "loss": result.nll_nats / result.num_tokens,
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity,
        "bits_per_byte": result.bits_per_byte,
        "unknown_share": result.unknown_share,
        "sees_later_tokens": trained.model.sees_later_tokens(),
        "balance": {layer: balance_metrics(sums) for layer, sums in result.sums.items()},
    }


def _table(args: Namespace, trained: LanguageRun, result: Evaluation) -> Table:
    where = f"{args.split}, {args.part.replace('-', ' ')}" if args.part != "all" else args.split
    table = Table(
        title=f"{args.run}, step {trained.step:,}: {where}", title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "perplexity per token": f"{result.perplexity:.3f}",
        "perplexity per word": _if_known(result.word_perplexity, ".3f"),
        "bits per byte": _if_known(result.bits_per_byte, ".4f"),
        "unknown tokens": f"{result.unknown_share:.2%}",
        "tokens": f"{result.num_tokens:,}",
    }
    for layer, sums in result.sums.items():
        for name, value in balance_metrics(sums).items():
            rows[f"{layer}: {name.replace('_', ' ')}"] = f"{value:.3g}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _if_known(value: float | None, form: str) -> str:
    return "not known for a part of this dataset" if value is None else format(value, form)


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
