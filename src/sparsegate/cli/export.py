"""`sparsegate export`: the weights of a run as one safetensors file."""

from argparse import Namespace
from pathlib import Path

from ..recipes.load import checkpoint_path
from ..training.exporting import export
from .trained import add_checkpoint, checkpoint_of, warn
from .verb import Parser, Verb

EXAMPLE = """
sparsegate export runs/book --out book.safetensors
sparsegate export runs/book --checkpoint last --out book-last.safetensors
sparsegate train small-moe-32 --data datasets/book --out runs/more --training.init-from book.safetensors
"""


def add_arguments(parser: Parser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN.safetensors)")


def run(args: Namespace) -> int:
    output = args.out or args.run.with_name(f"{args.run.name}.safetensors")
    checkpoint = checkpoint_path(args.run, checkpoint_of(args), warn)
    export(args.run, checkpoint, output)
    print(f"{output}: the weights of {checkpoint}")
    return 0


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
