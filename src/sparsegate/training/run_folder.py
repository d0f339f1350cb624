"""The folder of a run: what it was made with, its checkpoints, its log."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..data import Vocabulary, load_vocabulary, save_vocabulary
from .config import RunConfig
from .lock import LOCK_NAME
from .overrides import read_config, to_json
from .storage import UNFINISHED, read_json, write_json_atomically
from .strict_json import Json

CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
_STEP = re.compile(r"step-([0-9]{8,})")
# These may differ when a run goes on: they say how long and how fast, not what is learned from what. The
# vocabulary is the dataset's, whose fingerprint stays; configurations of earlier versions do not tell it.
_MAY_CHANGE = ("data", "vocabulary_fingerprint", "optim", "training")
# But these say what the optimizers' state is.
_STAYS = ("optim.experts", "optim.tables")


class RunDataset(Protocol):
    """What a run asks of every kind of dataset."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def require_vocabulary(self, vocabulary: Vocabulary) -> None: ...


def checkpoints_of(folder: Path) -> Path:
    """Where a run's checkpoints stand."""
    return folder / "checkpoints"


def holds_run(folder: Path) -> bool:
    """Whether a run was started in the folder."""
    return (folder / CONFIG).is_file()


def read_run_config(folder: Path) -> RunConfig:
    """The configuration of a run. ValueError where the folder is not a run's."""
    if not holds_run(folder):
        raise ValueError(
            f"{folder}: not a run: it has no {CONFIG}; give the folder that `sparsegate train` wrote"
        )
    return read_config(RunConfig, folder / CONFIG)


def for_dataset(config: RunConfig, dataset: RunDataset) -> RunConfig:
    """The configuration with what the dataset decides filled in: vocabulary size and fingerprints."""
    return replace(
        config,
        data_fingerprint=dataset.fingerprint,
        vocabulary_fingerprint=dataset.vocabulary.fingerprint,
        model=replace(config.model, vocab_size=dataset.vocabulary.size),
    )


def check_run_folder(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Look whether a run may be written here; nothing is.

    ValueError: the folder holds something else, or a run although `resume` is false, or a run that was made
    with another model, seed, dataset or recipe.
    """
    if holds_run(folder):
        if not resume:
            raise ValueError(
                f"{folder}: holds a run already; add --resume to go on with it, or give another --out"
            )
        _require_same_run(folder, read_run_config(folder), config)
    elif folder.is_dir() and any(not _may_be_there(entry.name) for entry in folder.iterdir()):
        raise ValueError(f"{folder}: not empty and not a run; give another --out")


def write_run_folder(folder: Path, config: RunConfig, dataset: RunDataset) -> None:
    """Make the folder a run's, by what the run is made with."""
    write_json_atomically(folder / CONFIG, to_json(config))
    save_vocabulary(dataset.vocabulary, folder / VOCABULARY)


def read_vocabulary(folder: Path, config: RunConfig) -> Vocabulary:
    """The vocabulary of a run. ValueError for another than it was trained with."""
    vocabulary = load_vocabulary(folder / VOCABULARY)
    if config.vocabulary_fingerprint not in ("", vocabulary.fingerprint):
        raise ValueError(
            f"{folder / VOCABULARY}: not the vocabulary that the run was trained with; restore that of its "
            "dataset"
        )
    return vocabulary


def saved_steps(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint, newest first; damaged ones are among them."""
    matches = [_STEP.fullmatch(entry.name) for entry in checkpoints_of(folder).glob("step-*")]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def write_best(folder: Path, *, step: int, nll: float) -> None:
    """Point at the checkpoint with the lowest validation loss. nll: nats per token. step 0: at none."""
    pointer = checkpoints_of(folder) / "best.json"
    if step:
        write_json_atomically(pointer, {"step": step, "nll": nll})
    else:
        pointer.unlink(missing_ok=True)


def read_best(folder: Path) -> int | None:
    """Step of the best checkpoint; None before the first evaluation."""
    pointer = checkpoints_of(folder) / "best.json"
    if not pointer.is_file():
        return None
    value = read_json(pointer)
    step = value.get("step") if isinstance(value, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{pointer}: does not name a step; remove it, and give --checkpoint last")
    return step


def what_is_learned(config: RunConfig) -> dict[str, Json]:
    """Every value of a configuration by its path, but where the data stands, which may differ by machine."""
    return {path: value for path, value in _values(to_json(config)) if path != "data"}


def _may_be_there(name: str) -> bool:
    """What a run leaves that is killed before it has a configuration."""
    return name == LOCK_NAME or name.startswith(UNFINISHED)


def _require_same_run(folder: Path, saved: RunConfig, given: RunConfig) -> None:
    before, now = dict(_values(to_json(saved))), dict(_values(to_json(given)))
    for path in sorted(now.keys() | before.keys()):
        may_change = path.partition(".")[0] in _MAY_CHANGE and path not in _STAYS
        if before.get(path) != now.get(path) and not may_change:
            raise ValueError(
                f"{path} ({now.get(path)}) is {before.get(path)} in {folder / CONFIG}; "
                "a run goes on only as what it was: give the same, or another --out"
            )


def _values(fields: Mapping[str, Json], path: str = "") -> Iterator[tuple[str, Json]]:
    """The values of a configuration and of its sections, each with its path."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _values(value, f"{path}{name}.")
        else:
            yield path + name, value
