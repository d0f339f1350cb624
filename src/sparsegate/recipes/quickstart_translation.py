"""The translation quickstart: numbers, dates and sums from English into French, out of nothing."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..data.parallel import TranslationDataset, prepare_translation
from ..data.parallel.spelled_out import Part, spelled_out_files
from ..training.config import OptimConfig, ParallelConfig, RunConfig, TrainingConfig
from .small_translation import small_translation_moe_32_noisy


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the quickstart does. num_pairs: of sentences, in all parts together."""

    num_pairs: dict[Part, int]
    vocabulary_size: int
    steps: int


FULL = Size(num_pairs={"train": 20_000, "valid": 400, "test": 400}, vocabulary_size=1000, steps=1000)
SHORT = Size(num_pairs={"train": 1000, "valid": 40, "test": 40}, vocabulary_size=500, steps=40)


def quickstart_translation() -> RunConfig:
    """32 experts, four of them active for each token."""
    return sized(FULL)


def sized(size: Size) -> RunConfig:
    """The run of a size: eight evaluations, each with a few translations."""
    config = small_translation_moe_32_noisy()
    return replace(
        config,
        name="quickstart-translation",
        model=replace(config.model, dropout=0.0),
        batches=ParallelConfig(batch_subwords=1024),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=size.steps // 10, constant_steps=size.steps // 5),
        training=TrainingConfig(
            steps=size.steps,
            evaluate_every=size.steps // 8,
            checkpoint_every=size.steps // 8,
            bleu_sentences=size.num_pairs["valid"] // 2,
        ),
    )


def spelled_out_dataset(folder: Path, size: Size) -> TranslationDataset:
    """The dataset in a folder, which is made if it is not there."""
    if folder.exists():
        return TranslationDataset.open(folder)
    with TemporaryDirectory() as text:
        texts = spelled_out_files(Path(text), source="en", target="fr", num_pairs=size.num_pairs, seed=1)
        return prepare_translation(
            output=folder,
            train=[texts["train"]],
            valid=[texts["valid"]],
            test=[texts["test"]],
            vocabulary_size=size.vocabulary_size,
        )
