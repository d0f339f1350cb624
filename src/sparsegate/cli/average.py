"""`sparsegate average`: the mean of several checkpoints, often a little better than each."""

from argparse import Namespace
from pathlib import Path

from ..training.averaging import average, steps_to_average
from .verb import Parser, Verb

EXAMPLE = """
sparsegate average runs/book --out runs/book-mean
sparsegate average runs/book --last 2 --out runs/book-last-2
sparsegate average runs/en-fr --steps 10 20 --out runs/en-fr-mean
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that `sparsegate train` wrote")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run that is made (default: RUN-average)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints (default: all)")
    which.add_argument(
        "--steps", type=int, nargs="+", default=[], metavar="STEP", help="checkpoints of these steps"
    )


def run(args: Namespace) -> int:
    steps = steps_to_average(args.run, last=args.last, steps=args.steps)
    output = args.out or args.run.with_name(f"{args.run.name}-average")
    average(args.run, steps=steps, output=output)
    print(f"{output}: the mean of the weights at step {', '.join(f'{step:,}' for step in steps)}")
    return 0


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
