"""Run folders as training leaves them, without training."""

from dataclasses import replace
from pathlib import Path

from sparsegate.data import Dataset, prepare, save_vocabulary
from sparsegate.data.parallel import ParallelText, TranslationDataset, prepare_translation
from sparsegate.models import MixtureLM
from sparsegate.models.gates import GateConfig, NoisyTopKGate
from sparsegate.models.translation import BlockConfig, MixtureBlock, Translation
from sparsegate.training.config import ContinuousConfig, ParallelConfig, RunConfig, SentencesConfig
from sparsegate.training.making import make_state
from sparsegate.training.overrides import to_json
from sparsegate.training.run_folder import VOCABULARY, RunDataset, checkpoints_of, write_best
from sparsegate.training.storage import write_json_atomically

LINES = [f"The {number} cats sat on {number % 7} mats ... and a dög, too." for number in range(300)]


def make_dataset(folder: Path, *, kind: str = "words", lines: list[str] = LINES) -> Dataset:
    """A dataset of three splits, each with all the lines."""
    folder.mkdir(parents=True)
    texts = [folder / f"{split}.txt" for split in ("train", "valid", "test")]
    for text in texts:
        text.write_text("".join(line + "\n" for line in lines))
    train, valid, test = ([text] for text in texts)
    size = 300 if kind == "subwords" else None
    return prepare(
        output=folder / "dataset",
        train=train,
        valid=valid,
        test=test,
        vocabulary=kind,
        vocabulary_size=size,
    )


def make_translation_dataset(
    folder: Path, *, lines: list[str] = LINES, both_directions: bool = False
) -> TranslationDataset:
    """Beginnings of the lines, and their words backwards as the translation. Of three parts, all alike."""
    folder.mkdir(parents=True)
    beginnings = [line.split()[: 2 + number % 9] for number, line in enumerate(lines)]
    texts: dict[str, list[ParallelText]] = {}
    for part in ("train", "valid", "test"):
        text = folder / f"{part}.en-fr.tsv"
        text.write_text("".join(f"{' '.join(words)}\t{' '.join(words[::-1])}\n" for words in beginnings))
        texts[part] = [ParallelText(languages=("en", "fr"), files=(text,))]
    return prepare_translation(
        output=folder / "dataset",
        **texts,
        vocabulary_size=300,
        both_directions=both_directions,
    )


def make_run(
    folder: Path,
    dataset: Dataset,
    *,
    steps: tuple[int, ...] = (10, 20),
    best: int | None = 10,
    sentences: bool = False,
    gate: GateConfig | None = None,
) -> RunConfig:
    """A run with checkpoints of random weights, other ones at each step."""
    model = MixtureLM(
        vocab_size=dataset.vocabulary.size,
        width=8,
        lstm_units=8,
        dropout=0.1,
        num_experts=4,
        k=2,
        hidden=8,
        gate=gate or NoisyTopKGate(),
    )
    batches = SentencesConfig() if sentences else ContinuousConfig()
    config = RunConfig(
        name="tiny",
        data=str(dataset.directory),
        data_fingerprint=dataset.fingerprint,
        model=model,
        batches=batches,
    )
    _write_run(folder, config, dataset, steps=steps, best=best)
    return config


def make_translation_run(
    folder: Path,
    dataset: TranslationDataset,
    *,
    steps: tuple[int, ...] = (10, 20),
    block: BlockConfig | None = None,
    seed: int = 1,
) -> RunConfig:
    """The same of a translation model, for all pairs of the dataset."""
    block = block or MixtureBlock(num_experts=4, k=2, hidden=8)
    model = Translation(
        vocab_size=dataset.vocabulary.size,
        width=8,
        lstm_units=8,
        dropout=0.1,
        attention_width=8,
        encoder_block=block,
        decoder_block=block,
    )
    config = RunConfig(
        name="tiny",
        data=str(dataset.directory),
        data_fingerprint=dataset.fingerprint,
        seed=seed,
        model=model,
        batches=ParallelConfig(pairs=tuple(dataset.part("train"))),
    )
    _write_run(folder, config, dataset, steps=steps, best=steps[0])
    return config


def _write_run(
    folder: Path, config: RunConfig, dataset: RunDataset, *, steps: tuple[int, ...], best: int | None
) -> None:
    folder.mkdir(parents=True)
    write_json_atomically(folder / "config.json", to_json(config))
    save_vocabulary(dataset.vocabulary, folder / VOCABULARY)
    for step in steps:
        state = make_state(replace(config, seed=config.seed * step))
        state.progress.step = step
        state.save(checkpoints_of(folder), keep=steps)
    if best is not None:
        write_best(folder, step=best, nll=1.0)
