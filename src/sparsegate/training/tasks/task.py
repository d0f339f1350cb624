"""What a run is about: the one thing that differs between language models and translation models."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ...models import LayeredModel
from ...moe.routing import BalanceSums
from ..config import RunConfig
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
    def parts(self, model: Model, batch_index: int, carried: State) -> list[Part]:
        """A batch of the training split, a pure function of the seed and its index, in micro-batches.

        carried: recurrent state of the batch before, which goes on where the text does.
        """

    @abstractmethod
    def evaluate(self, model: Model) -> Measured:
        """Measure on the validation split."""
