"""`sparsegate search`: learning rates and dropout by trying."""

import math
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..moe.precision import flushed_denormals
from ..recipes.registry import RECIPES
from ..recipes.search import Trial, search
from ..training.display import exp
from .train import config
from .verb import Parser, Verb

EXAMPLE = """
sparsegate search small-moe-32 --data datasets/book --out runs/rates --learning-rates 4e-3 8e-3 1.6e-2
sparsegate search small-moe-256-h --data datasets/book --out runs/experts --learning-rates 1.6e-2 \
  --expert-rates 0.0625 0.125 0.25 0.5 1
sparsegate search small-moe-4 --data datasets/book --out runs/both --learning-rates 4e-3 8e-3 --dropouts 0 0.1
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", help=f"recipe: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder for all the runs")
    parser.add_argument("--learning-rates", type=float, nargs="+", required=True, metavar="X")
    parser.add_argument(
        "--expert-rates",
        type=float,
        nargs="+",
        metavar="X",
        help="of experts, over the learning rate (default: the recipe's)",
    )
    parser.add_argument("--dropouts", type=float, nargs="+", metavar="X", help="(default: the recipe's)")
    parser.set_defaults(resume=False, short=False)


@flushed_denormals()  # before torch starts its threads
def run(args: Namespace) -> int:
    if not args.config.data:
        raise ValueError("--data: give the dataset to train on, a folder that `sparsegate prepare` made")
    console = Console(stderr=True)
    try:
        trials = search(
            args.config,
            folder=args.out,
            learning_rates=args.learning_rates,
            expert_rates=args.expert_rates or [args.config.optim.expert_rate],
            dropouts=args.dropouts or [args.config.model.dropout],
            console=console if console.is_terminal else None,
            on_trial=lambda t: console.print(
                f"learning rate {t.learning_rate:g}, experts {t.expert_rate:g} of it, dropout {t.dropout:g}: "
                f"validation perplexity {_perplexity(t)}"
            ),
        )
    except KeyboardInterrupt:
        console.print("stopped, and saved; the same command goes on")
        return 0
    Console().print(_table(args.name, trials))
    print(f"the best run: {args.out / trials[0].folder}")
    return 0


def _table(name: str, trials: list[Trial]) -> Table:
    table = Table(title=f"{name}, by validation perplexity, best first", title_justify="left")
    for heading in ("learning rate", "of experts", "dropout", "perplexity", "best step"):
        table.add_column(heading, justify="right")
    for t in trials:
        table.add_row(
            f"{t.learning_rate:g}",
            f"{t.expert_rate:g}",
            f"{t.dropout:g}",
            _perplexity(t),
            str(t.best_step),
        )
    return table


def _perplexity(trial: Trial) -> str:
    return f"{exp(trial.valid_nll):.2f}" if math.isfinite(trial.valid_nll) else "diverged"


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run, config=config)
