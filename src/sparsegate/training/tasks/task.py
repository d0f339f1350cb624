"""What a run is about: the one thing that differs between language models and translation models."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ...decoding.inference import evaluation_mode
from ...models import LayeredModel
from ...moe.routing import BalanceSums
from ...parallel.placement import split
from ..config import RunConfig
from ..ranks import ALONE, Ranks
from ..run_folder import RunDataset

State = dict[str, tuple[Tensor, Tensor]]
SumsByLayer = dict[str, BalanceSums]
Model = TypeVar("Model", bound=LayeredModel)


class Measured(Protocol):
    """What an evaluation found: `loss`, in nats per token, decides which checkpoint is best."""

    def metrics(self) -> dict[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Sums over the real targets of a part, scalars. nll: nats. trained: what training lowers."""

    nll: Tensor
    trained: Tensor


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One pass over a part.

    sums: of the gates, by layer. state: what recurrent layers carry on to the next batch. losses: computes
    them, if they are wanted.
    """

    sums: SumsByLayer
    state: State
    losses: Callable[[], Losses]


class Part(Protocol):
    """Some rows of a batch, on the model's device, with all that a repeated pass must find equal.

    seed: of the dropout. num_tokens: real targets.
    """

    @property
    def seed(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def forward(self) -> Forward:
        """Pass the rows through the model, from the random state that the seed gives."""
        ...


def micro_batches(num_rows: int, config: RunConfig, ranks: Ranks) -> list[range]:
    """The rows of each of this rank's micro-batches; some may be empty where there are fewer rows."""
    own = ranks.rows(num_rows)
    most_on_a_rank = -(-num_rows // ranks.num_ranks)
    parts = split(len(own), min(config.training.micro_batches, most_on_a_rank))
    return [range(own.start + part.start, own.start + part.stop) for part in parts]


def evaluation_peers(model: LayeredModel, ranks: Ranks) -> Ranks:
    """Who share an evaluation out: all ranks.

    But where a gate chooses over the batch in evaluation, too, each rank measures the whole split by itself,
    so that the result does not depend on the number of ranks.
    """
    with evaluation_mode(model):
        chooses = any(layer.selects_over_batch for _, layer in model.named_layers())
    return ALONE if chooses else ranks


class Task(ABC, Generic[Model]):
    """A dataset and what is made of it: the parts of each batch, and the measure of a model.

    config: with what the dataset decides filled in.
    """

    config: RunConfig

    @property
    @abstractmethod
    def dataset(self) -> RunDataset:
        """What is trained on."""

    @abstractmethod
    def parts(self, model: Model, batch_index: int, carried: State, ranks: Ranks) -> list[Part]:
        """This rank's rows of a batch of the training split, in micro-batches, equally many on all ranks.

        The batch is a pure function of the seed and its index, and the rows are one of it and the ranks.
        carried: recurrent state of the same rows of the batch before, which goes on where the text does.
        """

    @abstractmethod
    def require_measurable(self, model: Model) -> None:
        """ValueError for a model that `evaluate` could not measure as it is asked to."""

    @abstractmethod
    def evaluate(self, model: Model, ranks: Ranks) -> Measured:
        """Measure on the validation split, each rank its share; all get the same result."""
