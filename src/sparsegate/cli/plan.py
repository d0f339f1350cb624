"""`sparsegate plan`: what a model costs, before it is built."""

import json
from argparse import Namespace
from dataclasses import asdict, fields

from rich.console import Console
from rich.table import Table

from ..recipes.planner import plan
from ..recipes.registry import RECIPES, recipe
from ..training.config import RunConfig
from .verb import Parser, Verb

EXAMPLE = """
sparsegate plan moe-256
sparsegate plan moe-32 --model.num-experts 64 --json
sparsegate plan translation-moe-2048-h
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", help=f"recipe: {', '.join(RECIPES)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def config(args: Namespace) -> RunConfig | None:
    name = getattr(args, "name", None)
    return None if name is None else recipe(name)


def run(args: Namespace) -> int:
    counted = plan(args.config.model)
    if args.json:
        print(json.dumps(asdict(counted)))
        return 0
    table = Table(title=args.name, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for field in fields(counted):
        number = getattr(counted, field.name)
        table.add_row(field.metadata["doc"], f"{number:,}", f"{number / 1e6:,.1f} M")
    Console().print(table)
    return 0


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run, config=config)
