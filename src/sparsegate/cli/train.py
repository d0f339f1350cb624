"""`sparsegate train`: a recipe and a dataset to a trained model."""

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..recipes.registry import RECIPES, recipe
from ..training.config import RunConfig
from ..training.loop import TrainResult, train
from ..training.run_folder import holds_run, read_run_config
from .verb import Parser, Verb

EXAMPLE = """
sparsegate train small-moe-32 --data datasets/book --out runs/book
sparsegate train small-moe-32 --data datasets/book --out runs/book --resume
sparsegate train small-moe-32 --data datasets/book --out runs/64 --model.num-experts 64 --training.steps 4000
sparsegate train small-translation-moe-32 --data datasets/en-de --out runs/en-de
sparsegate train small-moe-32 --data datasets/more --out runs/tuned --training.init-from runs/book
"""

# What else to do with a run, by the kind of its batches.
_USES = {
    "continuous": "sparsegate generate {} --prompt TEXT",
    "sentences": "sparsegate generate {} --prompt TEXT",
    "parallel": "sparsegate translate {} < TEXT",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", help=f"recipe: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, or start it")


def folder_of(args: Namespace) -> Path:
    return args.out or Path("runs") / args.name


def config(args: Namespace) -> RunConfig | None:
    """A resumed run is what it was; another starts as the recipe says."""
    if getattr(args, "name", None) is None:
        return None
    folder = folder_of(args)
    return read_run_config(folder) if args.resume and holds_run(folder) else recipe(args.name)


def run(args: Namespace) -> int:
    if not args.config.data:
        raise ValueError("--data: give the dataset to train on, a folder that `sparsegate prepare` made")
    folder, console = folder_of(args), Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    result = train(replace(args.config, name=args.name), folder=folder, resume=args.resume, console=console)
    console.print(_summary(result))
    return 0


def _summary(result: TrainResult) -> str:
    progress, folder = result.state.progress, result.folder
    if result.stopped_by:
        saved = f"saved at step {progress.step:,}" if progress.step else "left before the first step"
        return f"{saved} on {result.stopped_by}; the same command with --resume goes on"
    skipped = f", {progress.skipped} batches skipped as not finite" if progress.skipped else ""
    return (
        f"{progress.step:,} steps, {progress.tokens:,} tokens{skipped}; best at step {progress.best_step:,}\n"
        f"sparsegate evaluate {folder} --split valid\n{_USES[result.config.batches.kind].format(folder)}"
    )


VERB = Verb(example=EXAMPLE, add_arguments=add_arguments, run=run, config=config)
