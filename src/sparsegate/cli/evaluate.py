"""`sparsegate evaluate`: how good a trained model is on held-out text."""

from argparse import Namespace
from pathlib import Path

from ..evaluation import PARTS
from ..recipes.language_run import LanguageRun
from . import evaluate_language, evaluate_translation
from .decoding_options import add_decoding
from .trained import add_run, load_run
from .verb import Parser, Verb

EXAMPLE = """
sparsegate evaluate runs/book
sparsegate evaluate runs/book --split valid --part second-half --json
sparsegate evaluate runs/book --data datasets/other --split test
sparsegate evaluate runs/en-fr --resamples 1000 --against runs/dense
"""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="another dataset than the run's, with the same vocabulary"
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "valid", "test"), help="of the dataset (default: test)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    language = parser.add_argument_group("for language models")
    language.add_argument("--part", default="all", choices=PARTS, help="of the split (default: all)")
    language.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="stretches read side by side (default: 16)"
    )
    evaluate_translation.add_arguments(parser)
    add_decoding(parser)


def run(args: Namespace) -> int:
    trained = load_run(args)
    if isinstance(trained, LanguageRun):
        evaluate_translation.refuse_options(args)
        evaluate_language.run(args, trained)
    else:
        evaluate_translation.run(args, trained)
    return 0


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
