"""`sparsegate quickstart`: everything at once, from text to a table."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..decoding import Sampling
from ..moe.precision import flushed_denormals
from ..recipes.load import load, require_language
from ..recipes.quickstart import FULL, SHORT, Row, compare, corpus, dense, mixture
from .progress import read_bytes
from .verb import Parser, Verb

EXAMPLE = """
sparsegate quickstart --out quickstart
sparsegate quickstart --out first-look --short
"""

_PROMPTS = ("def ", "class ", "    return ", "import ")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="for all it makes (default: quickstart)",
    )
    parser.add_argument("--short", action="store_true", help="a minute of it, to see that everything works")


@flushed_denormals()  # before torch starts its threads
def run(args: Namespace) -> int:
    console = Console()
    size, folder = (SHORT, args.out / "short") if args.short else (FULL, args.out)
    console.print("[bold]1[/] a corpus from the sources of Python's standard library")
    with read_bytes() as progress:
        dataset = corpus(folder / "data", size, progress=progress)
    split = dataset.split("train")
    console.print(
        f"  {split.num_tokens:,} tokens of {dataset.vocabulary.size:,} subwords in {folder / 'data'}"
    )
    rows = []
    for number, (config, what) in enumerate(
        [
            (mixture(size), "a mixture of 32 experts, 4 of them active for each token"),
            (dense(size), "the dense model of equal multiply-adds per token"),
        ],
        start=2,
    ):
        console.print(f"[bold]{number}[/] training {what}")
        row = compare(config, data=folder / "data", folder=folder / config.name, console=console)
        if row is None:
            console.print("stopped, and saved; the same command goes on")
            return 0
        rows.append(row)
    console.print("[bold]4[/] on files that neither has seen", _table(rows))
    console.print("[bold]5[/] the mixture writes")
    _write(rows[0], console)
    console.print(f"more of it: sparsegate generate {rows[0].folder} --multiline --prompt 'class '")
    return 0


def _table(rows: list[Row]) -> Table:
    lines = {
        "multiply-adds per token": lambda r: f"{r.plan.ops_per_timestep:,}",
        "parameters": lambda r: f"{r.plan.parameters:,}",
        "perplexity per token": lambda r: f"{r.evaluation.perplexity:.2f}",
        "bits per byte": lambda r: f"{r.evaluation.bits_per_byte:.3f}",
        "tokens per second, training": lambda r: f"{r.tokens_per_second:,.0f}",
        "CV of the experts' load": lambda r: f"{r.balance['cv_load']:.2f}" if r.balance else "",
        "greatest over mean load": lambda r: f"{r.balance['max_over_mean_load']:.2f}" if r.balance else "",
        "experts without a token": lambda r: f"{r.balance['dead_experts']:.0f}" if r.balance else "",
    }
    table = Table()
    table.add_column("")
    for row in rows:
        table.add_column(row.name, justify="right")
    for heading, show in lines.items():
        table.add_row(heading, *(show(row) for row in rows))
    return table


def _write(row: Row, console: Console) -> None:
    sampling = Sampling(max_tokens=60, temperature=0.7, top_p=0.95, stop=(), seed=1)
    for written in require_language(load(row.folder)).generate(_PROMPTS, sampling=sampling):
        console.print(f"[bold]{written.prompt}[/]", end="", highlight=False)
        console.print(written.text, highlight=False, markup=False)
        console.print()


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
