"""What a study is, and the folder that holds one.

study.json           the configuration, and the versions and commands by which the folder came about
search/MODEL/        search.json: the rates that were tried
runs/MODEL/seed-N/   a run, as `sparsegate train` leaves it, and measured.json: its test likelihoods
results.json, results.md, figures
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ...benchmarking.measuring import circumstances
from ...data import Dataset
from ...training.config import RunConfig, SentencesConfig, require
from ...training.memory import require_memory_for
from ...training.overrides import from_json, to_json
from ...training.run_folder import for_dataset
from ...training.storage import make_directory, read_json, write_json_atomically
from ...training.strict_json import Json
from .ladder import SCALES, Gates, Scale, budget_of, for_study, language_model, member

FORMAT = 2
STUDY = "study.json"
# What may be asked of a folder anew: each run is by itself, and a longer one passes through a shorter one.
_MAY_CHANGE = ("data", "models", "other_costs", "seeds", "words", "keep_weights")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared with what.

    words: budgets, ascending, one end for each sentence counted. expert_rates: of the mixtures' experts, over
    the learning rate, which is that of everything else.
    """

    scale: Literal["laptop", "gpu"]
    data: str
    data_fingerprint: str
    models: tuple[str, ...]
    other_costs: tuple[str, ...]
    seeds: tuple[int, ...]
    words: tuple[int, ...]
    gates: Gates
    batches: SentencesConfig
    dropout: float
    learning_rates: tuple[float, ...]
    expert_rates: tuple[float, ...]
    search_words: int
    keep_weights: bool = field(metadata={"doc": "whether checkpoints stay when a run has been measured"})

    def __post_init__(self) -> None:
        require(bool(self.models), "models", "none", "at least one")
        for name in ("models", "other_costs", "seeds", "words", "learning_rates", "expert_rates"):
            _require_different(name, getattr(self, name))
        require(min(self.words) > 0, "words", _shown(self.words), "above 0")
        require(list(self.words) == sorted(self.words), "words", _shown(self.words), "ascending")
        require(min(self.seeds) >= 0, "seeds", _shown(self.seeds), "at least 0")
        require(min(self.learning_rates) > 0, "learning_rates", _shown(self.learning_rates), "above 0")
        require(min(self.expert_rates) > 0, "expert_rates", _shown(self.expert_rates), "above 0")
        require(self.search_words > 0, "search_words", self.search_words, "above 0")
        both = sorted({*self.models} & {*self.other_costs})
        require(not both, "other_costs", ", ".join(both), "other models than those that are compared")

    @property
    def defaults(self) -> Scale:
        return SCALES[self.scale]

    @property
    def ops_per_timestep(self) -> int:
        """Multiply-adds for each word that all of `models` have."""
        return budget_of(self.defaults)

    def run_config(self, name: str) -> RunConfig:
        """How a model of the study is trained, but for its seed, rates and length.

        ValueError: it does not do the multiply-adds of the comparison.
        """
        config = language_model(name)
        if name in self.models:
            config = member(name, budget=self.ops_per_timestep, gates=self.gates)
        config = for_study(config, self.defaults, batches=self.batches, dropout=self.dropout)
        return replace(config, data=self.data)

    def check(self, dataset: Dataset) -> None:
        """Refuse models that are not of equal cost, or that cannot be trained here, before anything is."""
        for name in (*self.models, *self.other_costs):
            config = for_dataset(self.run_config(name), dataset)
            try:
                require_memory_for(config)
            except ValueError as error:
                raise ValueError(f"models ({name}), scale ({self.scale}): {error}") from None


def open_folder(folder: Path, study: Study) -> None:
    """Make the folder a study's, or go on with the study that is in it; the command is added to its record.

    ValueError: the folder holds something else, or a study of another version or configuration. Nothing has
    been changed then.
    """
    path = folder / STUDY
    commands: list[Json] = []
    if path.is_file():
        commands = _require_same(path, study)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty and not a study; give another --out")
    make_directory(folder)
    here = {key: value for key, value in circumstances().items() if key != "version"}
    write_json_atomically(
        path,
        {
            "format": FORMAT,
            "version": version("sparsegate"),
            "study": to_json(study),
            "commands": [*commands, *([here] if here not in commands else [])],
        },
    )


def read_study(folder: Path) -> Study:
    """The study of a folder. ValueError where there is none, or one of another version."""
    return _read(folder / STUDY)[0]


def _read(path: Path) -> tuple[Study, list[Json]]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: not a study: it has no {STUDY}")
    match read_json(path):
        case {"format": int(found)} if found != FORMAT:
            raise ValueError(_other_version(path, f"format {found}", f"format {FORMAT}"))
        case {"format": _, "version": str(made), "study": saved, "commands": list(commands)}:
            if made != version("sparsegate"):
                raise ValueError(_other_version(path, f"version {made}", f"version {version('sparsegate')}"))
        case _:
            raise ValueError(f"{path}: does not tell of a study; restore it, or give another --out")
    try:
        return from_json(Study, saved), commands
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _other_version(path: Path, made: str, here: str) -> str:
    return (
        f"{path}: made by {made} of sparsegate, and this is {here}: figures of both would not compare; "
        "go on with that one, or give another --out"
    )


def _require_same(path: Path, study: Study) -> list[Json]:
    saved, commands = _read(path)
    before, now = to_json(saved), to_json(study)
    for name in (name for name in now if name not in _MAY_CHANGE):
        _require_equal(name, before[name], now[name], path)
    return commands


def _require_equal(name: str, before: Json, now: Json, path: Path) -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            _require_equal(key, before.get(key), now[key], path)
    elif before != now:
        raise ValueError(
            f"{name} ({_plain(now)}) is {_plain(before)} in {path}; give the same, or another --out"
        )


def _require_different(name: str, values: Sequence[object]) -> None:
    require(len(set(values)) == len(values), name, _shown(values), "given once each")


def _shown(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


def _plain(value: Json) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
