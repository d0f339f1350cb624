"""`sparsegate prepare`: text to a dataset."""

from argparse import Namespace
from argparse import _ArgumentGroup as ArgumentGroup
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..data.dataset import Dataset
from ..data.prepare import HoldOut, prepare
from ..data.text import TextOptions
from ..data.train_vocabulary import VocabularyKind
from . import parallel
from .verb import Parser, Verb

EXAMPLE = """
sparsegate prepare book.txt --output datasets/book --vocabulary subwords --vocabulary-size 8192
sparsegate prepare train.txt --valid valid.txt --test test.txt --output datasets/news
sparsegate prepare --pair en-fr:train.en,train.fr --valid-pair en-fr:valid.tsv --output datasets/en-fr
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
            "TEXT is a file, or a folder of files; .gz is unpacked, .jsonl holds one object a line.",
        )
    )


def _add_vocabulary(group: ArgumentGroup) -> None:
    kinds = get_args(VocabularyKind)
    group.add_argument("--vocabulary", choices=kinds, help="what an id stands for (default: words)")
    group.add_argument("--vocabulary-size", type=int, metavar="N", help="keep the N most frequent")
    group.add_argument(
        "--vocabulary-from", type=Path, metavar="DIR", help="take over that of another dataset"
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
    group.add_argument("--field", default="text", help="key of the text in JSON lines (default: text)")
    group.add_argument("--keep-blank-lines", action="store_true", help="blank lines are sentences too")
    group.add_argument("--replace-bad-bytes", action="store_true", help="replace what is not UTF-8")
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
        with progress_bar() as progress:
            parallel.run(args, text=text, progress=progress)
        return 0
    with progress_bar() as progress:
        dataset = prepare(
            output=args.output,
            train=args.train,
            valid=args.valid,
            test=args.test,
            vocabulary=args.vocabulary or (None if args.vocabulary_from else "words"),
            vocabulary_size=args.vocabulary_size,
            vocabulary_from=args.vocabulary_from,
            tokenized=args.tokenized,
            hold_out=args.hold_out,
            valid_share=args.valid_share,
            test_share=args.test_share,
            text=text,
            progress=progress,
        )
    Console().print(_summary(args.output, dataset))
    return 0


@contextmanager
def progress_bar() -> Generator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(directory: Path, dataset: Dataset) -> Table:
    vocabulary = dataset.vocabulary
    table = Table(title=f"{directory}: {vocabulary.size:,} {vocabulary.kind}", title_justify="left")
    table.add_column("split")
    for heading in ("tokens", "sentences", "words", "bytes"):
        table.add_column(heading, justify="right")
    for name, split in dataset.splits.items():
        counts = (split.num_tokens, split.num_sentences, split.num_words, split.num_bytes)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
