"""The options of the verbs that translate: how translations are searched for, or drawn."""

from argparse import Namespace
from collections.abc import Mapping
from typing import TypeVar

from ..decoding import BeamSearch, TranslationSampling
from .verb import Parser

Number = TypeVar("Number", int, float)

_SEARCH = BeamSearch()
# Where the arguments have what the options say.
OF_SEARCH = {"--beam": "beam_size", "--alpha": "length_penalty", "--beta": "coverage_penalty"}
OF_DRAWS = {"--top-k": "top_k", "--top-p": "top_p", "--seed": "seed"}


def add_decoding(parser: Parser) -> None:
    group = parser.add_argument_group("how to translate")
    group.add_argument(
        "--beam",
        type=int,
        dest="beam_size",
        metavar="N",
        help=f"hypotheses of the beam search (default: {_SEARCH.beam_size})",
    )
    group.add_argument(
        "--alpha",
        type=float,
        dest="length_penalty",
        metavar="X",
        help=f"how much longer translations are favoured (default: {_SEARCH.length_penalty})",
    )
    group.add_argument(
        "--beta",
        type=float,
        dest="coverage_penalty",
        metavar="X",
        help="how much it is favoured that all of the source is translated "
        f"(default: {_SEARCH.coverage_penalty})",
    )
    group.add_argument(
        "--greedy", action="store_true", help="take the most probable subword of each step; faster"
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="draw translations instead; below 1 favours the probable",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable subwords only")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the most probable subwords that add up to P only"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")


def decoding_of(args: Namespace, *, num_best: int = 1) -> BeamSearch | TranslationSampling:
    """What the options ask for. ValueError for those that do not go together."""
    draws = args.temperature is not None
    ways = [flag for flag, given in (("--greedy", args.greedy), ("--temperature", draws)) if given]
    if len(ways) > 1:
        raise ValueError("--greedy: is not drawn; leave it or --temperature out")
    if ways:
        _refuse(args, OF_SEARCH, f"is for beam search; leave it or {ways[0]} out")
    if not draws:
        _refuse(args, OF_DRAWS, "is for drawn translations; give --temperature as well")
    if ways and num_best > 1:
        raise ValueError(f"--n-best: is for beam search; leave it or {ways[0]} out")
    if not ways:
        return BeamSearch(
            beam_size=_or(args.beam_size, max(_SEARCH.beam_size, num_best)),
            length_penalty=_or(args.length_penalty, _SEARCH.length_penalty),
            coverage_penalty=_or(args.coverage_penalty, _SEARCH.coverage_penalty),
            num_best=num_best,
        )
    return TranslationSampling(
        temperature=_or(args.temperature, 0.0), top_k=args.top_k, top_p=args.top_p, seed=_or(args.seed, 0)
    )


def _refuse(args: Namespace, flags: Mapping[str, str], why: str) -> None:
    for flag, name in flags.items():
        if getattr(args, name) is not None:
            raise ValueError(f"{flag}: {why}")


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
