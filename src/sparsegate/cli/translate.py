"""`sparsegate translate`: a trained translation model translates lines."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..decoding import Translation
from .decoding_options import add_decoding, decoding_of
from .progress import NowAndThen
from .trained import add_run, lines_as_they_come, load_translation_run
from .verb import Parser, Verb

EXAMPLE = """
echo "A man is riding a horse." | sparsegate translate runs/en-de
sparsegate translate runs/en-de news.en more.en --greedy > news.de
sparsegate translate runs/many --to fr --n-best 3 --json < sentences.txt > translations.jsonl
sparsegate translate runs/en-de news.en --attention > attention.jsonl
"""

_STANDARD_INPUT = Path("-")


def add_arguments(parser: Parser) -> None:
    parser.description = f"""{parser.description}

Writes the translation of each line as soon as there is one, in the order of the lines. An empty line stays
empty. Control characters count as spaces. A line of more subwords than --max-subwords is translated in parts,
cut where sentences end if possible."""
    add_run(parser)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="to translate; - is standard input (the default)"
    )
    parser.add_argument("--to", metavar="LANG", help="language to translate into, if there are several")
    parser.add_argument("--from", dest="source", metavar="LANG", help="language of the lines")
    parser.add_argument(
        "--n-best", type=int, metavar="N", help="N translations of each line, with scores, at most"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each line: source, translations"
    )
    parser.add_argument(
        "--attention",
        action="store_true",
        help="the same, with the subwords of each translation and what they attended to",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        dest="lines_at_once",
        metavar="N",
        help="lines translated at the same time (default: 64)",
    )
    parser.add_argument(
        "--max-subwords", type=int, default=250, metavar="N", help="of a part of a line (default: 250)"
    )
    parser.add_argument(
        "--replace-bad-bytes", action="store_true", help="replace what is not UTF-8 instead of ending there"
    )
    add_decoding(parser)


def run(args: Namespace) -> int:
    if args.n_best is not None and args.n_best < 1:
        raise ValueError(f"--n-best ({args.n_best}) must be at least 1")
    decoding = decoding_of(args, num_best=args.n_best or 1)
    translator = load_translation_run(args).translator(
        to=args.to,
        source=args.source,
        decoding=decoding,
        max_subwords=args.max_subwords,
        lines_at_once=args.lines_at_once,
        align=args.attention,
    )
    for path in args.files:
        if path != _STANDARD_INPUT:
            path.stat()  # one that is missing shows before others are translated
    progress = _Progress()
    for lines in _windows(args, translator.lines_at_once):
        first = progress.num_lines
        found = translator.translate_together(lines, first_number=first, tell=progress.tell_parts)
        for number, (line, translations) in enumerate(zip(lines, found, strict=True), start=first):
            _print(args, number, line, translations)
            sys.stdout.flush()
        progress.add(len(lines))
    return 0


def _windows(args: Namespace, size: int) -> Iterator[list[str]]:
    """The lines, up to `size` at a time of those that can be had without waiting."""
    for path in args.files or [_STANDARD_INPUT]:
        file = None if path == _STANDARD_INPUT else path
        for lines in lines_as_they_come(file, replace_bad_bytes=args.replace_bad_bytes):
            for start in range(0, len(lines), size):
                yield lines[start : start + size]


def _print(args: Namespace, number: int, line: str, translations: Sequence[Translation]) -> None:
    if args.json or args.attention:
        found = [_as_json(translation, attention=args.attention) for translation in translations]
        print(json.dumps({"source": line, "translations": found}, ensure_ascii=False))
    elif args.n_best is None:
        print(translations[0].text)
    else:
        for translation in translations:
            print(f"{number}\t{translation.score:.4f}\t{translation.text}")


def _as_json(translation: Translation, *, attention: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": translation.text,
        "score": translation.score,
        "logprob": translation.logprob,
    }
    if attention:
        fields["alignments"] = [
            {
                "source": alignment.source,
                "target": alignment.target,
                "attention": alignment.attention.astype(float).round(4).tolist(),
            }
            for alignment in translation.alignments
        ]
    return fields


class _Progress:
    """How many lines were translated, and how much of long ones."""

    def __init__(self) -> None:
        self.num_lines = 0
        self._lines = NowAndThen()

    def add(self, num_lines: int) -> None:
        self.num_lines += num_lines
        rate = self._lines.rate(self.num_lines)
        self._lines.tell(f"lines translated: {self.num_lines:,}, {rate:,.1f} a second")

    def tell_parts(self, done: int, of: int) -> None:
        if done < of:
            self._lines.tell(
                f"lines translated: {self.num_lines:,}, and {done:,} of {of:,} parts of the next"
            )


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
