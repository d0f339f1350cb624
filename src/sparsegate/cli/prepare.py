"""`sparsegate prepare`: text to a dataset."""

import os
from argparse import Namespace
from argparse import _ArgumentGroup as ArgumentGroup
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from ..data.corpus import HoldOut
from ..data.dataset import Dataset
from ..data.preparing import prepare
from ..data.text_options import TextOptions
from ..data.train_vocabulary import VocabularyKind
from . import parallel
from .progress import read_bytes
from .verb import Parser, Verb

EXAMPLE = """
sparsegate prepare book.txt --output datasets/book --vocabulary subwords --vocabulary-size 8192
sparsegate prepare train.txt --valid valid.txt --test test.txt --output datasets/news
sparsegate prepare --pair en-fr:train.en,train.fr --valid-pair en-fr:valid.tsv --output datasets/en-fr
sparsegate prepare 1-billion-word-language-modeling-benchmark-r13output --output datasets/lm1b --min-count 3
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("train", nargs="*", type=Path, metavar="TEXT", help="text to train on (see below)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the dataset, a new folder")
    _add_vocabulary(parser.add_argument_group("vocabulary"))
    _add_splits(parser.add_argument_group("text to validate and test on"))
    parallel.add_arguments(parser)
    _add_reading(
        parser.add_argument_group(
            "reading",
            "TEXT is a file, or a folder of files. Files .gz are unpacked, .jsonl and .json hold one "
            "object a line, .parquet needs pyarrow. A folder of the 1 Billion Word benchmark, of WikiText, "
            "or of shards that name their split brings text to train, validate and test on.",
        )
    )


def _add_vocabulary(group: ArgumentGroup) -> None:
    kinds = get_args(VocabularyKind)
    group.add_argument("--vocabulary", choices=kinds, help="what an id stands for (default: words)")
    group.add_argument("--vocabulary-size", type=int, metavar="N", help="keep the N most frequent")
    group.add_argument(
        "--min-count", type=int, default=1, metavar="N", help="keep what occurs N times or more (default: 1)"
    )
    group.add_argument(
        "--vocabulary-from",
        type=Path,
        metavar="PATH",
        help="take over that of another dataset, or a file of words, one a line, with or without counts",
    )
    group.add_argument("--tokenized", action="store_true", help="words are what stands between white space")


def _add_splits(group: ArgumentGroup) -> None:
    for split in ("valid", "test"):
        group.add_argument(f"--{split}", nargs="+", type=Path, default=[], metavar="TEXT")
    group.add_argument(
        "--hold-out",
        choices=get_args(HoldOut),
        default="lines",
        help="without --valid and --test: set lines or whole files of the other text aside (default: lines)",
    )
    for split in ("valid", "test"):
        group.add_argument(
            f"--{split}-share", type=float, default=0.01, metavar="X", help="how much of it (default: 0.01)"
        )


def _add_reading(group: ArgumentGroup) -> None:
    group.add_argument("--field", default="text", help="where JSON lines and parquet have it (default: text)")
    group.add_argument("--keep-blank-lines", action="store_true", help="blank lines are sentences too")
    group.add_argument("--replace-bad-bytes", action="store_true", help="replace what is not UTF-8")
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read; the result is the same for any number (default: one for each core)",
    )
    for name, what in (
        ("max-line-bytes", "refuse longer lines"),
        ("max-gzip-ratio", "refuse gzip files that unpack to more times their size"),
    ):
        default = getattr(TextOptions(), name.replace("-", "_"))
        group.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )


def run(args: Namespace) -> int:
    of_pairs = parallel.is_asked_for(args)
    text = TextOptions(
        field=args.field,
        keep_blank_lines=args.keep_blank_lines,
        replace_bad_bytes=args.replace_bad_bytes,
        max_line_bytes=args.max_line_bytes,
        max_gzip_ratio=args.max_gzip_ratio,
    )
    if of_pairs:
        with read_bytes() as progress:
            parallel.run(args, text=text, progress=progress)
        return 0
    with read_bytes() as progress:
        dataset = prepare(
            output=args.output,
            train=args.train,
            valid=args.valid,
            test=args.test,
            vocabulary=args.vocabulary or (None if args.vocabulary_from else "words"),
            vocabulary_size=args.vocabulary_size,
            min_count=args.min_count,
            vocabulary_from=args.vocabulary_from,
            tokenized=args.tokenized,
            hold_out=args.hold_out,
            valid_share=args.valid_share,
            test_share=args.test_share,
            text=text,
            workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
            progress=progress,
        )
    Console().print(_summary(args.output, dataset))
    return 0


def _summary(directory: Path, dataset: Dataset) -> Table:
    vocabulary = dataset.vocabulary
    layout = f", recognised as {dataset.manifest.layout}" if dataset.manifest.layout else ""
    title = f"{directory}: {vocabulary.size:,} {vocabulary.kind}{layout}"
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    for heading in ("tokens", "sentences", "words", "bytes"):
        table.add_column(heading, justify="right")
    for name, split in dataset.splits.items():
        counts = (split.num_tokens, split.num_sentences, split.num_words, split.num_bytes)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
