"""`sparsegate plan`: what a model costs, before it is built."""

import json
import math
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, fields, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..models import FeedForwardLM, MixtureLM, RecurrentLM
from ..models.memory import Memory, Method, training_memory
from ..models.translation import Translation
from ..recipes.cluster import Machine, gibibytes, lay_out, rows_per_expert
from ..recipes.planner import multiply_adds_per_number, plan
from ..recipes.registry import RECIPES, recipe
from ..training.config import RunConfig
from ..training.dry_run import dry_run
from ..training.memory import batch_tokens, method_of
from .verb import Parser, Verb

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EXAMPLE = """
sparsegate plan moe-256
sparsegate plan moe-32 --model.num-experts 64 --json
sparsegate plan news-moe-65536-h --devices 64 --memory 80GiB --optim.experts factored
sparsegate plan news-moe-131072-h --devices 1024 --dry-run
sparsegate plan moe-4096-h --memory 80GiB --optim.experts factored --optim.in-backward true
sparsegate plan translation-moe-2048-h
"""

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def quantity(text: str) -> float:
    """A number with a unit's prefix, such as 80GiB, 450GB/s or 989T."""
    match = re.fullmatch(
        r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?) ?([kmgtp]?|[kmgt]i)(?:b|flops|flop|b/s|flop/s)?", text.lower()
    )
    number = math.inf if match is None else float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(number):
        raise ArgumentTypeError(f"{text}: give a number, as 80GiB, 450GB or 1e12")
    return number


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", help=f"recipe: {', '.join(RECIPES)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="also make the share of each of --devices ranks, on the meta device: every expert on exactly "
        "one of them, and bytes as planned",
    )
    machine = parser.add_argument_group("devices that a language model is laid over (defaults: an H100 SXM)")
    for f in fields(Machine):
        kind = {"devices": int, "efficiency": float}.get(f.name, quantity)
        machine.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=kind,
            metavar="N",
            help=f"{f.metadata['doc']} [{f.default:,}]",
        )


def config(args: Namespace) -> RunConfig | None:
    name = getattr(args, "name", None)
    return None if name is None else recipe(name)


def run(args: Namespace) -> int:
    model = args.config.model
    if args.dry_run and (args.devices is None or isinstance(model, Translation)):
        raise ValueError("--dry-run: needs --devices and a language model; give both")
    counted = plan(model)
    if not isinstance(model, MixtureLM | FeedForwardLM | RecurrentLM):
        for name in (f.name for f in fields(Machine) if getattr(args, f.name) is not None):
            raise ValueError(f"--{name.replace('_', '-')}: is for language models; leave it out")
        _print(args, asdict(counted), [(args.name, _counts(counted))])
        return 0
    method, tokens = method_of(args.config), batch_tokens(args.config)
    memory = training_memory(model, method)
    parts: dict[str, Any] = {
        **asdict(counted),
        "batch_tokens": tokens,
        "rows_per_expert": rows_per_expert(model, tokens),
        "multiply_adds_per_number": multiply_adds_per_number(model),
        "memory": asdict(memory) | {"weights": memory.weights},
    }
    tables = [(args.name, [*_counts(counted), *_expert_rows(parts)]), (_head(method), _memory_rows(memory))]
    machine = machine_of(args)
    layout = None
    if machine is not None:
        layout = lay_out(
            model,
            machine,
            method,
            batch_tokens=tokens,
            micro_batches=args.config.training.micro_batches,
            expert_copies=args.config.training.expert_copies,
        )
        parts |= {"machine": asdict(machine), "layout": asdict(layout)}
        tables += [("the machine", _rows(machine)), ("a step of training, on each device", _rows(layout))]
    if machine is not None and args.dry_run:
        planned = training_memory(
            model, replace(method, devices=machine.devices // args.config.training.expert_copies)
        )
        found = dry_run(args.config, num_ranks=machine.devices)
        found.require(planned)
        parts["dry_run"] = asdict(found)
        tables.append(("a dry run; bytes, as planned, are of the rank that holds most", _rows(found)))
    _print(args, parts, tables)
    if machine is not None and layout is not None:
        layout.require_memory(machine)
    return 0


def machine_of(args: Namespace) -> Machine | None:
    """The machine that was described, the rest of it by default; None where none was."""
    names = (f.name for f in fields(Machine))
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "memory" in given:
        given["memory"] = int(given["memory"])
    return Machine(**given) if given else None


def _print(
    args: Namespace, parts: Mapping[str, Any], tables: list[tuple[str, list[tuple[str, ...]]]]
) -> None:
    if args.json:
        print(json.dumps(parts))
        return
    for title, rows in tables:
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column(justify="right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _counts(counted: "DataclassInstance") -> list[tuple[str, ...]]:
    return [(f.metadata["doc"], f"{number:,}", f"{number / 1e6:,.1f} M") for f, number in _values(counted)]


def _expert_rows(parts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    if not parts["rows_per_expert"]:
        return []
    ratio, rows = parts["multiply_adds_per_number"], parts["rows_per_expert"]
    return [
        (f"tokens for each expert, of {parts['batch_tokens']:,} in a batch", f"{rows:,.1f}", ""),
        ("multiply-adds of an expert for each number it takes or gives", f"{ratio:,.0f}", ""),
    ]


def _head(method: Method) -> str:
    return f"memory of training on one device, {method.tokens:,} tokens at once"


def _memory_rows(memory: Memory) -> list[tuple[str, ...]]:
    return [(f.metadata["doc"], f"{number:,}", gibibytes(number)) for f, number in _values(memory)]


def _rows(section: "DataclassInstance") -> list[tuple[str, ...]]:
    return [(f.metadata["doc"], *_shown(f.metadata["doc"], number)) for f, number in _values(section)]


def _shown(doc: str, number: float) -> tuple[str, str]:
    if isinstance(number, int):
        return f"{number:,}", gibibytes(number) if "bytes" in doc else ""
    return f"{number:,.0f}" if number.is_integer() and number < 1e9 else f"{number:,.4g}", ""


def _values(section: "DataclassInstance") -> Iterator[tuple[Field[Any], Any]]:
    return ((f, getattr(section, f.name)) for f in fields(section))


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run, config=config)
