"""What `sparsegate train quickstart-translation` does beside training: text before, translations after."""

from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..recipes.load import load, require_translation
from ..recipes.quickstart_translation import FULL, SHORT, sized, spelled_out_dataset
from ..training.config import RunConfig

NAME = "quickstart-translation"
_NUM_SHOWN = 8


def short_config(name: str) -> RunConfig:
    """The run of seconds. ValueError for a recipe that has none."""
    if name != NAME:
        raise ValueError(f"--short: is for {NAME}; leave it out, or set --training.steps")
    return sized(SHORT)


def make_dataset(folder: Path, *, short: bool) -> Path:
    """The text to train on, beside the run."""
    dataset = folder.with_name(f"{folder.name}-data")
    spelled_out_dataset(dataset, SHORT if short else FULL)
    return dataset


def show(folder: Path, console: Console) -> None:
    """Translate some lines that the model has not seen."""
    run = require_translation(load(folder))
    dataset = run.dataset()
    (pair,) = dataset.part("test").values()
    sources, references = (
        list(islice(dataset.lines(side), _NUM_SHOWN)) for side in (pair.source, pair.target)
    )
    table = Table(title="lines that it has not seen", title_justify="left")
    for heading in ("source", "translation", "right"):
        table.add_column(heading)
    for source, translation, reference in zip(sources, run.translate(sources), references, strict=True):
        right = "yes" if translation == reference else reference
        table.add_row(source, translation, right)
    console.print(table)
