"""`sparsegate conform`: the paper's laws, tried on a layer of any origin."""

import ast
import json
import math
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..evaluation.conformance.law import Law
from ..evaluation.conformance.suite import LAWS, Outcome, conform
from ..evaluation.conformance.target import load_factory
from ..training.overrides import did_you_mean
from .verb import Parser, Verb

EXAMPLE = """
sparsegate conform sparsegate.evaluation.conformance.own:noisy_topk
sparsegate conform sparsegate:MoE.noisy_topk width=16 hidden=32 num_experts=8 k=2 --width 16
"""
LAW_FAILED = 1

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "target",
        metavar="PACKAGE:FACTORY",
        help="makes the layer: returns a sparsegate.Implementation or an nn.Module",
    )
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="arguments of the factory")
    parser.add_argument("--width", type=int, help="width of the input, where an nn.Module is returned")
    parser.add_argument("--law", action="append", metavar="NAME", help="try this law alone; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = "exit code: 0 no law failed, 1 a law failed, 2 the target cannot be tried"


def run(args: Namespace) -> int:
    laws = _chosen(args.law)
    if "" not in sys.path:  # as `python -m` has it: modules of the current folder
        sys.path.insert(0, "")
    console = Console(file=sys.stdout, highlight=False)
    outcomes = []
    with redirect_stdout(sys.stderr):  # what the implementation prints is no part of the report
        factory = load_factory(args.target, width=args.width, arguments=_arguments(args.arguments))
        for outcome in conform(factory, laws):
            outcomes.append(outcome)
            if not args.json:
                _print(console, outcome)
    if args.json:
        print(json.dumps(as_json(args.target, outcomes), allow_nan=False))
    else:
        console.print(", ".join(f"{number} {result}" for result, number in count(outcomes).items()))
    return LAW_FAILED if any(outcome.result == "failed" for outcome in outcomes) else 0


def as_json(target: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The report as one JSON object; a number that is not finite is a string."""

    def finite(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    return {
        "target": target,
        **count(outcomes),
        "laws": [
            {
                "name": outcome.law.name,
                "statement": outcome.law.statement,
                "source": outcome.law.source,
                "result": outcome.result,
                "reason": outcome.reason,
                "numbers": [
                    {
                        "what": number.what,
                        "measured": finite(number.measured),
                        "expected": finite(number.expected),
                        "tolerance": finite(number.tolerance),
                    }
                    for number in outcome.numbers
                ],
            }
            for outcome in outcomes
        ],
    }


def count(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    return {result: sum(outcome.result == result for outcome in outcomes) for result in _STYLES}


def _print(console: Console, outcome: Outcome) -> None:
    """One line; of a failed law, what it says and the numbers below it."""
    style = _STYLES[outcome.result]
    why = f"  {outcome.told}" if outcome.result == "skipped" else ""
    console.print(f"[{style}]{outcome.result:<8}[/] {outcome.law.name}{escape(why)}", soft_wrap=True)
    if outcome.result == "failed":
        told = f"{outcome.law.statement} ({outcome.law.source})\n{outcome.told}"
        console.print(escape(textwrap.indent(told, " " * 9)), soft_wrap=True)


def _chosen(names: Sequence[str] | None) -> Sequence[Law]:
    by_name = {law.name: law for law in LAWS}
    for name in names or ():
        if name not in by_name:
            near = did_you_mean(name, by_name) or f"; there are {', '.join(by_name)}"
            raise ValueError(f"law ({name}): no such law{near}")
    return [by_name[name] for name in names] if names else LAWS


def _arguments(words: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE; a value is read as a Python literal, and is text where it is none."""
    found: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"argument ({word}) must be KEY=VALUE, such as num_experts=8")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
