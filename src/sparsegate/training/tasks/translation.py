"""Sentences and their translations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ...data.parallel import TranslationBatch, TranslationBatches, TranslationDataset
from ...decoding.inference import evaluation_mode
from ...decoding.target import require_independence
from ...decoding.translation import SharedSampling, TranslationSampling
from ...evaluation.translating import TranslationEvaluation, evaluate_pairs
from ...evaluation.translation import require_scores
from ...models.translation import TranslationModel, token_losses
from ...models.translation.model import ENCODER
from ..config import ParallelConfig, RunConfig
from ..noise import Draw, derived_seed, row_noise
from ..ranks import ALONE, Ranks
from ..run_folder import for_dataset
from .task import Forward, Losses, Part, State, Task, evaluation_peers, micro_batches


class TranslationTask(Task[TranslationModel]):
    """Translation between the pairs of languages of a dataset."""

    def __init__(self, config: RunConfig) -> None:
        batches = config.batches
        assert isinstance(batches, ParallelConfig)
        if config.training.bleu_sentences:
            require_scores()
        self._dataset = TranslationDataset.open(Path(config.data))
        names = batches.pairs or tuple(self._dataset.part("train"))
        self.config = replace(
            for_dataset(config, self._dataset), batches=replace(batches, pairs=tuple(names))
        )
        self.batches = TranslationBatches(
            pairs=[self._dataset.pair("train", name) for name in names],
            vocabulary=self._dataset.vocabulary,
            batch_subwords=batches.batch_subwords,
            seed=config.seed,
            temperature=batches.temperature,
        )
        valid = self._dataset.part("valid")
        self._valid = {name: valid[name] for name in names if name in valid}
        if not self._valid:
            raise ValueError(
                f"{config.data}: valid has none of the pairs to train on ({', '.join(names)}), but "
                f"{', '.join(valid)}; prepare it with such text"
            )

    @property
    def dataset(self) -> TranslationDataset:
        return self._dataset

    def parts(self, model: TranslationModel, batch_index: int, carried: State, ranks: Ranks) -> list[Part]:
        # Each pair begins anew: there is no state to carry.
        return list(translation_parts(model, self.batches.batch(batch_index), self.config, ranks))

    def require_measurable(self, model: TranslationModel) -> None:
        if self.config.training.bleu_sentences:
            with evaluation_mode(model):
                require_independence(model)

    def evaluate(self, model: TranslationModel, ranks: Ranks) -> TranslationEvaluation:
        return evaluate_pairs(
            model,
            self._dataset,
            self._valid,
            num_translated=self.config.training.bleu_sentences,
            # No gate of a model that translates chooses over the batch.
            decoding=SharedSampling(sampling=TranslationSampling(), peers=ranks),
            peers=evaluation_peers(model, ranks),
        )


@dataclass(frozen=True, kw_only=True)
class TranslationPart:
    """Some sentences to translate, and their translations."""

    model: TranslationModel
    source_BS: Tensor
    source_mask_BS: Tensor
    target_BS: Tensor
    target_mask_BS: Tensor
    label_BS: Tensor
    noise: dict[str, Tensor]
    label_smoothing: float
    seed: int
    num_tokens: int

    def forward(self) -> Forward:
        output = self.model(
            source_BS=self.source_BS,
            source_mask_BS=self.source_mask_BS,
            target_BS=self.target_BS,
            target_mask_BS=self.target_mask_BS,
            noise=self.noise,
        )

        def losses() -> Losses:
            found = token_losses(
                self.model.softmax,
                output.hidden_BSD,
                self.label_BS,
                self.target_mask_BS,
                label_smoothing=self.label_smoothing,
            )
            return Losses(nll=found.nll_BS.sum(), trained=found.loss_BS.sum())

        return Forward(
            sums={name: routing.sums for name, routing in output.routings.items()}, state={}, losses=losses
        )


def translation_parts(
    model: TranslationModel, batch: TranslationBatch, config: RunConfig, ranks: Ranks = ALONE
) -> Iterator[TranslationPart]:
    """The micro-batches of a batch. All are as wide as the batch, so that each token keeps its noise."""
    device = model.softmax.device
    num_steps = {True: batch.source_BS.shape[1], False: batch.target_BS.shape[1]}
    shapes = {
        name: (num_steps[name.startswith(ENCODER)], width) for name, width in model.noise_widths().items()
    }
    for rows in micro_batches(batch.num_sentences, config, ranks):
        first, end = rows.start, rows.stop
        noise = row_noise(
            shapes, seed=config.seed, batch_index=batch.index, first_row=first, num_rows=end - first
        )
        yield TranslationPart(
            model=model,
            source_BS=batch.source_BS[first:end].to(device),
            source_mask_BS=batch.source_mask_BS[first:end].to(device),
            target_BS=batch.target_BS[first:end].to(device),
            target_mask_BS=batch.target_mask_BS[first:end].to(device),
            label_BS=batch.label_BS[first:end].to(device),
            noise={name: draws.to(device) for name, draws in noise.items()},
            label_smoothing=config.losses.label_smoothing,
            seed=derived_seed(Draw.DROPOUT, config.seed, batch.index, first),
            num_tokens=int(batch.target_mask_BS[first:end].sum()),
        )
