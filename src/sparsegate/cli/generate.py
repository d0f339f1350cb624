"""`sparsegate generate`: a trained model goes on with prompts."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain

from ..decoding import Generated, Sampling, generate, stream
from ..recipes.language_run import LanguageRun
from .trained import add_run, lines_as_they_come, load_language_run
from .verb import Parser, Verb

EXAMPLE = """
sparsegate generate runs/book --prompt "It was a" --samples 3 --temperature 0.8 --top-p 0.95
sparsegate generate runs/book --multiline --max-tokens 300 --prompt ""
sparsegate generate runs/book --temperature 0 --json < prompts.txt > texts.jsonl
"""

_DEFAULT = Sampling()


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to go on from, may be given several times (default: each line of standard input)",
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=_DEFAULT.max_tokens,
        metavar="N",
        help=f"end after N tokens (default: {_DEFAULT.max_tokens})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=_DEFAULT.temperature,
        metavar="X",
        help="below 1 favours the probable, 0 takes the most probable token (default: 1)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the most probable tokens that add up to P only"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT; several times for several",
    )
    parser.add_argument("--multiline", action="store_true", help="go on over ends of lines")
    parser.add_argument("--allow-unknown", action="store_true", help="<unk> may be written")
    parser.add_argument(
        "--seed", type=int, default=_DEFAULT.seed, metavar="N", help="of the draws (default: 0)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="texts written at the same time (default: 32)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each text: prompt, text, tokens, end"
    )


def run(args: Namespace) -> int:
    sampling = Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=(*args.stop, *(() if args.multiline else ("\n",))),
        seed=args.seed,
        allow_unknown=args.allow_unknown,
    )
    for name, value in (("samples", args.samples), ("batch_size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    _check_encodable([*(args.prompt or []), *args.stop])
    trained = load_language_run(args)
    if args.prompt and len(args.prompt) == args.samples == 1 and not args.json:
        _write_at_once(trained, args.prompt[0], sampling)
        return 0
    prompts = args.prompt or chain.from_iterable(lines_as_they_come())
    # Each line that somebody types is to be answered before the next is read.
    batch_size = 1 if not args.prompt and sys.stdin.isatty() else args.batch_size
    texts = generate(
        trained.model,
        trained.vocabulary,
        _repeated(prompts, args.samples),
        sampling=sampling,
        batch_size=batch_size,
    )
    _print(texts, as_json=args.json, separator="\n" if args.multiline else "")
    return 0


def _check_encodable(texts: list[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{text!r}: is not UTF-8; give UTF-8") from None


def _repeated(prompts: Iterable[str], times: int) -> Iterator[str]:
    for prompt in prompts:
        for _ in range(times):
            yield prompt


def _write_at_once(trained: LanguageRun, prompt: str, sampling: Sampling) -> None:
    print(prompt, end="", flush=True)
    for piece in stream(trained.model, trained.vocabulary, prompt, sampling=sampling):
        print(piece, end="", flush=True)
    print()


def _print(texts: Iterable[Generated], *, as_json: bool, separator: str) -> None:
    """separator: between two texts, beside the end of a line; for texts of several lines an empty line."""
    for number, generated in enumerate(texts):
        if as_json:
            print(json.dumps(asdict(generated), ensure_ascii=False))
        else:
            print(f"{separator if number else ''}{generated.prompt}{generated.text}")
        sys.stdout.flush()


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
