"""The next token of a text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...data import Batch, ContinuousBatches, Dataset, SentenceBatches
from ...evaluation.perplexity import Evaluation, evaluate
from ...models import LanguageModel
from ..config import ContinuousConfig, RunConfig, SentencesConfig
from ..noise import Draw, derived_seed, gate_noise
from ..ranks import ALONE, Ranks
from ..run_folder import for_dataset
from .task import Forward, Losses, Part, State, Task, evaluation_peers, micro_batches


class LanguageTask(Task[LanguageModel]):
    """Language modelling."""

    def __init__(self, config: RunConfig) -> None:
        self._dataset = Dataset.open(Path(config.data))
        self.config = for_dataset(config, self._dataset)
        self.batches = make_batches(self.config, self._dataset)

    @property
    def dataset(self) -> Dataset:
        return self._dataset

    def parts(self, model: LanguageModel, batch_index: int, carried: State, ranks: Ranks) -> list[Part]:
        batch = self.batches.batch(batch_index)
        state = carried if batch.carries_state else {}
        return list(language_parts(model, batch, state, self.config, ranks))

    def require_measurable(self, model: LanguageModel) -> None:
        """Every model has a likelihood."""

    def evaluate(self, model: LanguageModel, ranks: Ranks) -> Evaluation:
        return evaluate(
            model,
            self._dataset.split("valid"),
            batch_size=16,
            num_steps=64,
            unknown_id=self._dataset.vocabulary.unknown_id,
            context=self.config.batches.context,
            peers=evaluation_peers(model, ranks),
        )


def make_batches(config: RunConfig, dataset: Dataset) -> ContinuousBatches | SentenceBatches:
    """The training split's batches, in the order that the configuration's seed gives."""
    token_file, batches = dataset.split("train"), config.batches
    if isinstance(batches, ContinuousConfig):
        return ContinuousBatches(
            token_file=token_file,
            batch_size=batches.batch_size,
            num_steps=batches.num_steps,
            seed=config.seed,
        )
    assert isinstance(batches, SentencesConfig)
    return SentenceBatches(
        token_file=token_file,
        batch_words=batches.batch_words,
        max_length=batches.max_length,
        seed=config.seed,
    )


@dataclass(frozen=True, kw_only=True)
class LanguagePart:
    """Some rows of tokens and of those that follow them."""

    model: LanguageModel
    input_BS: Tensor
    target_BS: Tensor
    mask_BS: Tensor
    state: State
    noise: dict[str, Tensor]
    seed: int
    num_tokens: int

    def forward(self) -> Forward:
        output = self.model(self.input_BS, state=self.state, mask_BS=self.mask_BS, noise=self.noise)

        def losses() -> Losses:
            nll_BS = self.model.softmax.nll(output.hidden_BSD, self.target_BS)
            nll = (nll_BS * self.mask_BS).sum()
            return Losses(nll=nll, trained=nll)

        return Forward(
            sums={name: routing.sums for name, routing in output.routings.items()},
            state=output.state,
            losses=losses,
        )


def language_parts(
    model: LanguageModel, batch: Batch, state: State, config: RunConfig, ranks: Ranks = ALONE
) -> Iterator[LanguagePart]:
    """The micro-batches of a rank's rows, which go on from `state` where there is one."""
    device = model.softmax.device
    widths = model.noise_widths()
    num_rows = batch.input_BS.shape[0]
    before = ranks.rows(num_rows).start
    for rows in micro_batches(num_rows, config, ranks):
        first, end = rows.start, rows.stop
        carried = slice(first - before, end - before)
        input_BS = batch.input_BS[first:end].to(device)
        noise = gate_noise(
            widths,
            seed=config.seed,
            batch_index=batch.index,
            first_row=first,
            shape_BS=(end - first, input_BS.shape[1]),
        )
        yield LanguagePart(
            model=model,
            input_BS=input_BS,
            target_BS=batch.target_BS[first:end].to(device),
            mask_BS=batch.mask_BS[first:end].to(device),
            state={name: (h[:, carried], c[:, carried]) for name, (h, c) in state.items()},
            noise={name: draws.to(device) for name, draws in noise.items()},
            seed=derived_seed(Draw.DROPOUT, config.seed, batch.index, first),
            num_tokens=int(batch.mask_BS[first:end].sum()),
        )
