"""`sparsegate train`: a recipe and a dataset to a trained model."""

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..moe.precision import flushed_denormals
from ..recipes.registry import RECIPES, recipe
from ..training.config import RunConfig
from ..training.loop import TrainResult, train
from ..training.run_folder import holds_run, read_run_config
from . import quickstart_translation
from .verb import Parser, Verb

EXAMPLE = """
sparsegate train small-moe-32 --data datasets/book --out runs/book
sparsegate train small-moe-32 --data datasets/book --out runs/book --resume
sparsegate train small-moe-32 --data datasets/book --out runs/64 --model.num-experts 64 --training.steps 4000
sparsegate train quickstart-translation
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
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"{quickstart_translation.NAME}: seconds of it, to see that it works",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, or start it")


def folder_of(args: Namespace) -> Path:
    return args.out or Path("runs") / args.name


def config(args: Namespace) -> RunConfig | None:
    """A resumed run is what it was; another starts as the recipe says."""
    if getattr(args, "name", None) is None:
        return None
    folder = folder_of(args)
    if args.resume and holds_run(folder):
        return read_run_config(folder)
    return quickstart_translation.short_config(args.name) if args.short else recipe(args.name)


@flushed_denormals()  # before torch starts its threads
def run(args: Namespace) -> int:
    folder, console = folder_of(args), Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    config, is_quickstart = args.config, args.name == quickstart_translation.NAME
    if is_quickstart and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{quickstart_translation.NAME}: is for one process; start it without torchrun")
    if is_quickstart and not config.data:
        config = replace(config, data=str(quickstart_translation.make_dataset(folder, short=args.short)))
    if not config.data:
        raise ValueError("--data: give the dataset to train on, a folder that `sparsegate prepare` made")
    result = train(replace(config, name=args.name), folder=folder, resume=args.resume, console=console)
    console.print(_summary(result))
    if is_quickstart and not result.stopped_by:
        quickstart_translation.show(folder, Console())
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
