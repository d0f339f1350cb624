"""`sparsegate bench`: the layer timed against a dense one, its peers and the machine."""

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from errno import EACCES
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..benchmarking.measuring import circumstances, store
from ..benchmarking.report import tables
from ..benchmarking.shape import DTYPES, Shape
from ..benchmarking.sweep import Experiment, measure
from .verb import Parser, Verb

EXAMPLE = """
sparsegate bench layer --experts 4 32 --repeats 3
sparsegate bench tokens --experts 256 --tokens 256 1024 4096 --out results --plot
sparsegate bench small-batch --tokens 1 16 --no-peers --json
"""


class Sweep(NamedTuple):
    """What is varied, and where it begins."""

    experts: Sequence[int]
    tokens: Sequence[int]
    training: bool


SWEEPS = {
    "layer": Sweep([4, 32, 256, 1024], [4096], training=True),
    "tokens": Sweep([256], [256, 512, 1024, 2048, 4096, 8192, 16_384], training=True),
    "small-batch": Sweep([256], [1, 4, 16, 64], training=False),
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "sweep",
        choices=SWEEPS,
        help="over the number of experts, or of tokens; small-batch: forward alone, as in generation",
    )
    shape = parser.add_argument_group("shape")
    for name, what in (("experts", "experts"), ("tokens", "tokens of the batch")):
        defaults = "; ".join(f"{key}: {_words(getattr(sweep, name))}" for key, sweep in SWEEPS.items())
        shape.add_argument(
            f"--{name}", type=int, nargs="+", metavar="N", help=f"{what} (default: {defaults})"
        )
    for name, default, what in (
        ("width", 512, "of input and output"),
        ("hidden", 1024, "of each expert"),
        ("k", 4, "experts per token"),
    ):
        shape.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    shape.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    _add_measuring(parser.add_argument_group("measuring"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, metavar="DIR", help="write DIR/SWEEP.json, which also tells the machine"
    )
    output.add_argument("--plot", action="store_true", help="also DIR/SWEEP.png and .svg")
    output.add_argument("--json", action="store_true", help="print one JSON object")


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: 5)")
    group.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own choice)")
    group.add_argument(
        "--peers",
        action=switch,
        default=True,
        help="a plain loop too, and other packages as far as they are installed",
    )
    group.add_argument(
        "--davidmrau", type=Path, metavar="FILE", help="moe.py of davidmrau/mixture-of-experts"
    )
    group.add_argument(
        "--memory", action=switch, default=True, help="memory too, each in a process of its own (sweep layer)"
    )


def run(args: Namespace) -> int:
    experiment = _experiment(args)
    draw = _drawing(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with redirect_stdout(sys.stderr):  # what peers print is no part of the report
        results = circumstances() | measure(experiment, say=print)
    if args.out is not None:
        store(args.out / f"{args.sweep}.json", results)
    draw(results)
    print(json.dumps(results, allow_nan=False) if args.json else tables(results))
    return 0


def _experiment(args: Namespace) -> Experiment:
    """What was asked for, refused before anything is allocated if it cannot be."""
    sweep = SWEEPS[args.sweep]
    experts, tokens = args.experts or sweep.experts, args.tokens or sweep.tokens
    fixed, values = ("tokens", tokens) if args.sweep == "layer" else ("experts", experts)
    if len(values) > 1:
        raise ValueError(f"{fixed} ({_words(values)}) must be one number in the sweep {args.sweep}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads ({args.threads}) must be at least 1")
    if args.davidmrau is not None:
        args.davidmrau.open().close()  # a path that is wrong is the user's, not a peer that is absent
    return Experiment(
        name=args.sweep,
        shapes=[
            Shape(tokens=t, width=args.width, hidden=args.hidden, experts=e, k=args.k, dtype=args.dtype)
            for e in dict.fromkeys(experts)
            for t in dict.fromkeys(tokens)
        ],
        training=sweep.training,
        repeats=args.repeats,
        peers=args.peers,
        davidmrau=args.davidmrau,
        memory=args.memory and args.sweep == "layer",
    )


def _drawing(args: Namespace) -> Callable[[dict[str, Any]], None]:
    """What draws the picture, once it is known that it can, and that the folder takes it."""
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK | os.X_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), str(args.out))
    if not args.plot:
        return lambda results: None
    if args.out is None:
        raise ValueError("plot: needs a folder to write to; add --out DIR")
    try:
        plot = import_module("sparsegate.benchmarking.plot")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"plot: {error.name} is not installed; pip install 'sparsegate[plots]', or leave --plot out"
        ) from None
    pictures = [args.out / f"{args.sweep}{suffix}" for suffix in (".png", ".svg")]
    return lambda results: plot.draw([results], pictures)


def _words(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
