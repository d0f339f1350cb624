"""`sparsegate.load(RUN)`: the trained model of a run, ready to score, write and be measured."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import Dataset, Vocabulary, load_vocabulary
from ..decoding import Generated, Sampling, Scored, generate, score
from ..evaluation import Evaluation, Part, evaluate, part_of
from ..models import LanguageModel, build
from ..training.checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint
from ..training.config import RunConfig
from ..training.loop import resolve_device
from ..training.run_folder import VOCABULARY, checkpoints_of, read_best, read_run_config
from ..training.state import load_weights


@dataclass(frozen=True, kw_only=True)
class LanguageRun:
    """A trained language model, in evaluation mode, with its vocabulary and how it came about.

    step: of the checkpoint that the weights are from.
    """

    folder: Path
    config: RunConfig
    vocabulary: Vocabulary
    model: LanguageModel
    step: int

    def score(self, lines: Iterable[str]) -> Iterator[Scored]:
        """Log-probability of each line and its tokens; see `decoding.score`."""
        return score(self.model, self.vocabulary, _several("lines", lines))

    def generate(
        self, prompts: Iterable[str], *, sampling: Sampling | None = None, batch_size: int = 32
    ) -> Iterator[Generated]:
        """How each prompt goes on; see `decoding.generate`. sampling: None is `Sampling()`."""
        return generate(
            self.model,
            self.vocabulary,
            _several("prompts", prompts),
            sampling=sampling or Sampling(),
            batch_size=batch_size,
        )

    def evaluate(
        self,
        split: str = "test",
        *,
        data: Path | str | None = None,
        part: Part = "all",
        batch_size: int = 16,
        num_steps: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Measure the model on a split of a dataset, with the context that it was trained with.

        data: the dataset. None: the one it was trained on. part: of the split. batch_size, num_steps: see
        `evaluation.evaluate`; with these defaults the result is the one that training reports. progress: is
        told the tokens done and all tokens.

        Raises:
            ValueError, OSError: the dataset is damaged, absent or made with another vocabulary.
        """
        dataset = self._dataset(data)
        token_file = dataset.split(split)
        token_file.verify(vocabulary_size=self.vocabulary.size)
        text = part_of(token_file, dataset.vocabulary, part)
        done = 0

        def advance(num_tokens: int) -> None:
            nonlocal done
            done += num_tokens
            if progress is not None:
                progress(done, len(text.token_N))

        return evaluate(
            self.model,
            text,
            batch_size=batch_size,
            num_steps=num_steps,
            unknown_id=self.vocabulary.unknown_id,
            context=self.config.batches.context,
            progress=advance,
        )

    def _dataset(self, data: Path | str | None) -> Dataset:
        if data is None and not Path(self.config.data).is_dir():
            raise ValueError(
                f"{self.config.data}: the dataset that {self.folder} was trained on is not there; give --data"
            )
        dataset = Dataset.open(Path(self.config.data if data is None else data))
        dataset.require_vocabulary(self.vocabulary)
        return dataset


def load(
    folder: Path | str,
    *,
    checkpoint: str | int = "best",
    device: str = "auto",
    warn: Callable[[str], None] = warnings.warn,
) -> LanguageRun:
    """Load the model that `sparsegate train` left in a folder.

    checkpoint: "best" by validation loss (the last where none was measured), "last", or a step of which
    there is one. device: "auto", "cpu" or "cuda". warn: is told in one line about each damaged checkpoint
    that "last" passes over.

    Raises:
        ValueError, OSError: one line: the folder is no run, or something in it is damaged or does not fit.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    vocabulary = load_vocabulary(folder / VOCABULARY)
    if vocabulary.size != config.model.vocab_size:
        raise ValueError(
            f"{folder / VOCABULARY}: has {vocabulary.size:,} entries, but model.vocab_size is "
            f"{config.model.vocab_size:,}; restore the vocabulary that the run was trained with"
        )
    path = _checkpoint(folder, checkpoint, warn)
    loaded = load_checkpoint(path)
    model = _model(config, loaded.tensors["model"], path)
    return LanguageRun(
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        model=model.to(resolve_device(device)),
        step=loaded.step,
    )


def _checkpoint(folder: Path, which: str | int, warn: Callable[[str], None]) -> Path:
    checkpoints = checkpoints_of(folder)
    best = read_best(folder) if which == "best" else None
    step = which if isinstance(which, int) else best
    if step is not None:
        return checkpoints / checkpoint_name(step)
    if which not in ("best", "last"):
        raise ValueError(f"checkpoint ({which}) must be best, last or the number of a step")
    path = latest_checkpoint(checkpoints, warn=warn)
    if path is None:
        raise ValueError(f"{folder}: has no checkpoint yet; train it for longer")
    return path


def _model(config: RunConfig, weights: dict[str, torch.Tensor], path: Path) -> LanguageModel:
    """The model in evaluation mode. What the configuration says is compared before memory is taken for it."""
    model = build(config.model, device="meta")
    described = sum(tensor.numel() for tensor in model.state_dict().values())
    stored = sum(tensor.numel() for tensor in weights.values())
    if described != stored:
        raise ValueError(
            f"{path}: holds {stored:,} weights, but config.json describes a model of {described:,}; "
            "restore the config.json that the run was trained with"
        )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} is not finite; use an earlier checkpoint")
    model.to_empty(device="cpu")
    load_weights(model, weights, where=str(path))
    return model.eval()


def _several(name: str, texts: Iterable[str]) -> Iterable[str]:
    """`texts`, unless they are one text, whose characters would be taken for texts."""
    if isinstance(texts, str):
        raise ValueError(f"{name}: is one text; give a list of texts")
    return texts
