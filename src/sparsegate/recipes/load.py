"""`sparsegate.load(RUN)`: the trained model of a run."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.joint_subwords import JointSubwords
from ..models import LanguageModel, build
from ..models.translation import TranslationModel
from ..training.checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint
from ..training.config import RunConfig
from ..training.making import resolve_device
from ..training.run_folder import (
    VOCABULARY,
    checkpoints_of,
    read_best,
    read_run_config,
    read_vocabulary,
    saved_steps,
)
from ..training.state import require_weights
from .language_run import LanguageRun
from .translation_run import TranslationRun


def load(
    folder: Path | str,
    *,
    checkpoint: str | int = "best",
    device: str = "auto",
    warn: Callable[[str], None] = warnings.warn,
) -> LanguageRun | TranslationRun:
    """Load the model that `sparsegate train` left in a folder.

    checkpoint: "best" by validation loss (the last where none was measured), "last", or a step of which
    there is one. device: "auto", "cpu" or "cuda". warn: is told in one line about each damaged checkpoint
    that "last" passes over.

    Raises:
        ValueError, OSError: one line: the folder is no run, or something in it is damaged or does not fit.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    vocabulary = read_vocabulary(folder, config)
    if vocabulary.size != config.model.vocab_size:
        raise ValueError(
            f"{folder / VOCABULARY}: has {vocabulary.size:,} entries, but model.vocab_size is "
            f"{config.model.vocab_size:,}; restore the vocabulary that the run was trained with"
        )
    path = checkpoint_path(folder, checkpoint, warn)
    try:
        loaded = load_checkpoint(path, only=["model"])
    except ValueError:
        if path.exists():
            raise
        # A run that goes on has deleted it since, for the sake of another one.
        path = checkpoint_path(folder, checkpoint, warn)
        loaded = load_checkpoint(path, only=["model"])
    model = _model(config, loaded.tensors["model"], path).to(resolve_device(device))
    if not isinstance(model, TranslationModel):
        return LanguageRun(folder=folder, config=config, vocabulary=vocabulary, model=model, step=loaded.step)
    if not isinstance(vocabulary, JointSubwords):
        raise ValueError(
            f"{folder / VOCABULARY}: {vocabulary.kind}, but translation needs {JointSubwords.kind}; restore "
            "the vocabulary that the run was trained with"
        )
    return TranslationRun(folder=folder, config=config, vocabulary=vocabulary, model=model, step=loaded.step)


def require_language(run: LanguageRun | TranslationRun) -> LanguageRun:
    """The run of a language model. ValueError for another."""
    if not isinstance(run, LanguageRun):
        cure = "give one of a language model, or use `sparsegate translate`"
        raise ValueError(f"{run.folder}: is the run of a translation model; {cure}")
    return run


def require_translation(run: LanguageRun | TranslationRun) -> TranslationRun:
    """The run of a translation model. ValueError for another."""
    if not isinstance(run, TranslationRun):
        cure = "give one of a translation model, or use `sparsegate generate`"
        raise ValueError(f"{run.folder}: is the run of a language model; {cure}")
    return run


def checkpoint_path(folder: Path, which: str | int, warn: Callable[[str], None]) -> Path:
    """A checkpoint of a run; see `load`."""
    checkpoints = checkpoints_of(folder)
    best = read_best(folder) if which == "best" else None
    step = which if isinstance(which, int) else best
    if isinstance(which, int) and which not in (steps := saved_steps(folder)):
        there = ", ".join(f"{step:,}" for step in steps) or "none"
        raise ValueError(f"{folder}: has no checkpoint of step {which:,}; there are: {there}")
    if step is not None:
        return checkpoints / checkpoint_name(step)
    if which not in ("best", "last"):
        raise ValueError(f"checkpoint ({which}) must be best, last or the number of a step")
    path = latest_checkpoint(checkpoints, warn=warn)
    if path is None:
        raise ValueError(f"{folder}: has no checkpoint yet; train it for longer")
    return path


def _model(
    config: RunConfig, weights: dict[str, torch.Tensor], path: Path
) -> LanguageModel | TranslationModel:
    """The model in evaluation mode, whose weights these become; what the configuration says is compared."""
    model = build(config.model, device="meta")
    described = sum(tensor.numel() for tensor in model.state_dict().values())
    stored = sum(tensor.numel() for tensor in weights.values())
    if described != stored:
        raise ValueError(
            f"{path}: holds {stored:,} weights, but config.json describes a model of {described:,}; "
            "restore the config.json that the run was trained with"
        )
    for name, tensor in weights.items():
        # Not `isfinite` of each number, which takes memory for all of them.
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{path}: {name} is not finite; use an earlier checkpoint")
    require_weights(model, weights, where=str(path))
    own = model.state_dict()
    model.load_state_dict({name: weights[name].to(own[name].dtype) for name in own}, assign=True)
    return model.eval()
