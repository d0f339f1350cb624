"""The options of `sparsegate prepare` for parallel text, and what it does with them."""

from argparse import Namespace
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from ..data.parallel import LengthFilter, TranslationDataset, parse_parallel_text, prepare_translation
from ..data.text_options import TextOptions
from .verb import Parser

_FORM = "LANGUAGES:FILES"
_DEFAULTS = LengthFilter()

# What is of no use with pairs, and what without, by the value that it has when it is not given.
_TEXT_ALONE = {
    "train": [],
    "valid": [],
    "test": [],
    "vocabulary": None,
    "min_count": 1,
    "tokenized": False,
    "hold_out": "lines",
    "field": "text",
    "keep_blank_lines": False,
    "workers": None,
}
_PAIRS_ALONE = {
    "both_directions": False,
    "max_subwords": _DEFAULTS.max_subwords,
    "max_ratio": _DEFAULTS.max_ratio,
}


def add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group(
        "parallel text to translate, instead of TEXT",
        "en-fr:a.en,a.fr are two aligned files; en-fr:a.tsv is one of tab-separated columns, en-fr:a.jsonl "
        "one of objects with the keys en and fr; en-fr:a.tsv@1,3 names columns or keys. Give each option as "
        "often as there are texts.",
    )
    group.add_argument("--pair", action="append", default=[], metavar=_FORM, help="pairs to train on")
    for part in ("valid", "test"):
        group.add_argument(f"--{part}-pair", action="append", default=[], metavar=_FORM)
    group.add_argument("--both-directions", action="store_true", help="en-fr is fr-en, too")
    group.add_argument(
        "--max-subwords",
        type=int,
        default=_DEFAULTS.max_subwords,
        metavar="N",
        help=f"leave longer train pairs out (default: {_DEFAULTS.max_subwords})",
    )
    group.add_argument(
        "--max-ratio",
        type=float,
        default=_DEFAULTS.max_ratio,
        metavar="X",
        help="leave train pairs out of which one side is X times as long as the other "
        f"(default: {_DEFAULTS.max_ratio:g})",
    )


def is_asked_for(args: Namespace) -> bool:
    """Whether there are pairs. ValueError for options that only make sense with them, or without."""
    given = bool(args.pair or args.valid_pair or args.test_pair)
    for name, default in (_TEXT_ALONE if given else _PAIRS_ALONE).items():
        if getattr(args, name) != default:
            flag = "TEXT" if name == "train" else "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag}: is for text of one language; leave it out beside --pair"
                if given
                else f"{flag}: is for parallel text; give a --pair"
            )
    return given


def run(args: Namespace, *, text: TextOptions, progress: Callable[[int, int], None]) -> None:
    dataset = prepare_translation(
        output=args.output,
        train=[parse_parallel_text(word) for word in args.pair],
        valid=[parse_parallel_text(word) for word in args.valid_pair],
        test=[parse_parallel_text(word) for word in args.test_pair],
        both_directions=args.both_directions,
        vocabulary_size=args.vocabulary_size,
        vocabulary_from=args.vocabulary_from,
        filters=LengthFilter(max_subwords=args.max_subwords, max_ratio=args.max_ratio),
        valid_share=args.valid_share,
        test_share=args.test_share,
        text=text,
        progress=progress,
    )
    console = Console()
    console.print(_summary(dataset))
    for line in _left_out(dataset):
        console.print(line, highlight=False)


def _summary(dataset: TranslationDataset) -> Table:
    title = f"{dataset.directory}: {dataset.vocabulary.size:,} joint subwords"
    if dataset.manifest.both_directions:
        title += ", both directions"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("pair")
    # Narrow enough for a file and a terminal of 80 columns; what does not fit is broken, not cut.
    for heading in ("sentences", "subwords", "subwords", "words", "words"):
        table.add_column(heading, justify="right", overflow="fold")
    for part, bitexts in dataset.manifest.parts.items():
        for pair, bitext in bitexts.items():
            first, second = bitext.first, bitext.second
            counts = (first.sentences, first.tokens, second.tokens, first.words, second.words)
            table.add_row(part, pair, *(f"{count:,}" for count in counts))
    return table


def _left_out(dataset: TranslationDataset) -> Iterator[str]:
    """Of which pairs how many sentences were not taken, and why."""
    for part, bitexts in dataset.manifest.parts.items():
        for pair, bitext in bitexts.items():
            reasons = [
                f"{count:,} {reason.replace('_', ' ')}" for reason, count in bitext.left_out.items() if count
            ]
            if reasons:
                yield f"{part}, {pair}: left out {', '.join(reasons)}"
