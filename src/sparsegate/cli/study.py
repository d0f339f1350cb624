"""`sparsegate study`: models of equal cost, trained alike, and the figures that compare them."""

from argparse import BooleanOptionalAction, Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from rich.console import Console

from ..data import Dataset
from ..moe.precision import flushed_denormals
from ..recipes.planner import plan
from ..recipes.study.config import Study, open_folder, read_study
from ..recipes.study.ladder import SCALES
from ..recipes.study.results import collect, table, to_rows
from ..recipes.study.runs import Runner, Stopped
from ..training.storage import write_file_atomically, write_json_atomically
from .verb import Parser, Verb

EXAMPLE = """
sparsegate study --data datasets/book --out studies/book
sparsegate study --data datasets/book --out studies/book --seeds 1 2 3 --words 500000 2000000 8000000
sparsegate study --data datasets/news --out studies/gpu --scale gpu --learning-rates 2e-3
sparsegate study --out studies/book --report
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="the dataset")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the study; one that is there goes on",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="laptop",
        help="where the defaults of the other options are from, and what trains (default: laptop)",
    )
    asked = parser.add_argument_group("what is compared; a study that is there can be given more of it")
    asked.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"of equal cost (laptop: {' '.join(SCALES['laptop'].models)})",
    )
    asked.add_argument(
        "--other-costs",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models of other cost, for figure 2 right",
    )
    asked.add_argument(
        "--words",
        type=int,
        nargs="+",
        metavar="N",
        help=f"budgets; each run is measured at all of them (laptop: {_words(SCALES['laptop'].words)})",
    )
    asked.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="(default: 1)")
    asked.add_argument(
        "--keep-weights",
        action=BooleanOptionalAction,
        default=True,
        help="of runs that have been measured, for other verbs and larger budgets",
    )
    fixed = parser.add_argument_group("how it is compared")
    fixed.add_argument(
        "--gates",
        choices=("within", "on-top"),
        default="within",
        help="within: experts are narrower by what their gate costs, so that no mixture does more than the "
        "dense models; on-top: as in the paper, up to 7%% more (default: within)",
    )
    fixed.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        metavar="X",
        help="the best of them for each model, after a short training; one alone is taken as it is "
        f"(laptop: {_words(SCALES['laptop'].learning_rates)})",
    )
    fixed.add_argument(
        "--search-words",
        type=int,
        metavar="N",
        help=f"of each trial (laptop: {SCALES['laptop'].search_words})",
    )
    fixed.add_argument(
        "--batch-words",
        type=int,
        metavar="N",
        help=f"tokens in a batch, about (laptop: {SCALES['laptop'].batches.batch_words})",
    )
    fixed.add_argument(
        "--expert-rates",
        type=float,
        nargs="+",
        metavar="X",
        help="of the mixtures' experts, over the learning rate: searched together with it "
        f"(laptop: {_words(SCALES['laptop'].expert_rates)})",
    )
    fixed.add_argument("--dropout", type=float, default=0.0, metavar="X", help="of all models (default: 0)")
    parser.add_argument(
        "--report", action="store_true", help="train nothing; results and figures of what is there"
    )


@flushed_denormals()  # before torch starts its threads
def run(args: Namespace) -> int:
    console = Console(stderr=True)
    if args.report:
        report(args.out, read_study(args.out), console)
        return 0
    study = study_of(args)
    study.check(Dataset.open(args.data))
    open_folder(args.out, study)
    for name in study.models:
        ops = plan(study.run_config(name).model).ops_per_timestep
        console.print(f"{name}: {ops:,} multiply-adds for each word")
    runner = Runner(
        study=study,
        folder=args.out,
        console=console,
        say=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    try:
        runner.run(lambda: report(args.out, study, None))
    except Stopped:
        console.print("stopped, and saved; the same command goes on")
        return 0
    report(args.out, study, console)
    return 0


def study_of(args: Namespace) -> Study:
    """The study that was asked for. ValueError for a value that does not fit."""
    if args.data is None:
        raise ValueError("--data: give the dataset to train on, a folder that `sparsegate prepare` made")
    scale = SCALES[args.scale]
    batches = scale.batches
    if args.batch_words is not None:
        batches = replace(batches, batch_words=args.batch_words)
    return Study(
        scale=args.scale,
        data=str(args.data),
        data_fingerprint=Dataset.open(args.data).fingerprint,
        models=tuple(args.models or scale.models),
        other_costs=tuple(args.other_costs),
        seeds=tuple(args.seeds),
        words=tuple(args.words or scale.words),
        gates=args.gates,
        batches=batches,
        dropout=args.dropout,
        learning_rates=tuple(args.learning_rates or scale.learning_rates),
        expert_rates=tuple(args.expert_rates or scale.expert_rates),
        search_words=scale.search_words if args.search_words is None else args.search_words,
        keep_weights=args.keep_weights,
    )


def report(folder: Path, study: Study, console: Console | None) -> None:
    """Write results and figures of what has been measured so far. console: None says nothing."""
    rows = collect(folder, study)
    write_json_atomically(folder / "results.json", to_rows(rows))
    text = f"# {title(study)}\n\n{table(rows)}".encode()
    write_file_atomically(folder / "results.md", [text], size=len(text))
    try:
        pictures = import_module("sparsegate.recipes.study.plot").draw(
            rows, title=title(study), folder=folder
        )
        said = " ".join(map(str, pictures))
    except ModuleNotFoundError as error:
        said = (
            f"no figures: {error.name} is not installed; pip install 'sparsegate[plots]', and "
            f"`sparsegate study --out {folder} --report` draws them"
        )
    if console is not None:
        print(table(rows) if rows else "nothing has been measured yet")
        console.print(said, markup=False, soft_wrap=True)


def title(study: Study) -> str:
    return f"{study.ops_per_timestep / 1e6:.3g} million multiply-adds for each word"


def _words(values: tuple[object, ...]) -> str:
    return " ".join(map(str, values))


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run)
