"""`sparsegate evaluate` for a language model."""

import json
import math
from argparse import Namespace

from rich.console import Console
from rich.table import Table

from ..evaluation import Evaluation
from ..inspection.balance import balance_metrics
from ..recipes.language_run import LanguageRun
from .progress import counted


def run(args: Namespace, trained: LanguageRun) -> None:
    with counted("evaluating") as progress:
        result = trained.evaluate(
            args.split, data=args.data, part=args.part, batch_size=args.batch_size, progress=progress
        )
    if not math.isfinite(result.nll_nats):
        raise ValueError(f"{args.run}: its likelihood is not finite; use an earlier checkpoint")
    if args.json:
        print(json.dumps(_as_json(args, trained, result), allow_nan=False))
    else:
        Console().print(_table(args, trained, result))


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
