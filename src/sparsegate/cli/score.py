"""`sparsegate score`: the log-probability of each line of standard input."""

import json
import sys
from argparse import Namespace

from ..data import Vocabulary
from ..decoding import Scored, score_lines
from .trained import add_run, lines_as_they_come, load_language_run
from .verb import Parser, Verb

EXAMPLE = """
echo "The cat sat on the mat." | sparsegate score runs/book
sparsegate score runs/book --per-token < sentences.txt > scores.jsonl
"""


def add_arguments(parser: Parser) -> None:
    parser.description = f"""{parser.description}

For each line of standard input, as soon as it comes, prints the natural logarithm of its probability as a
sentence, its number of tokens (the end of the sentence is one of them), and the line, separated by tabs."""
    add_run(parser)
    parser.add_argument(
        "--per-token",
        action="store_true",
        help="print a JSON object for each line instead, with the log-probability of each token",
    )


def run(args: Namespace) -> int:
    trained = load_language_run(args)
    for lines in lines_as_they_come():
        for scored in score_lines(trained.model, trained.vocabulary, lines):
            print(_per_token(scored, trained.vocabulary) if args.per_token else _per_line(scored))
        sys.stdout.flush()
    return 0


def _per_line(scored: Scored) -> str:
    return f"{scored.total:.6f}\t{len(scored.tokens)}\t{scored.text}"


def _per_token(scored: Scored, vocabulary: Vocabulary) -> str:
    return json.dumps(
        {
            "text": scored.text,
            "total": scored.total,
            "num_unknown": scored.num_unknown,
            "tokens": [vocabulary.decode([token]) for token in scored.tokens],
            "ids": scored.tokens,
            "logprobs": scored.logprobs,
        },
        ensure_ascii=False,
        allow_nan=False,
    )


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
