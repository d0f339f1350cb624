"""What of a model a process holds: all of it, or a share, and what its experts and gates compute with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..moe.experts.experts import Experts
from .softmax import AdaptiveSoftmax, OutputSoftmax, Softmax


class Embedding(Protocol):
    """What models ask of an embedding: rows [..., width] of words int64 [...]."""

    sparse: bool

    def __call__(self, word: Tensor, /) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Of an embedding and of a softmax."""

    vocab_size: int
    width: int
    device: torch.device | str | None
    dtype: torch.dtype | None


class Holding(ABC):
    """Decides, while a model is built, which of its stacked parts are made in this process, and where.

    Whatever is made has the weights that it has in the whole model.

    experts_on: the device of the experts; None: where the rest of the model is. They are the part that may
    fit there alone, and their weights are the same on every device. kernel: of experts, and of the gates that
    have one; None: each the first that suits it.
    """

    def __init__(self, *, experts_on: torch.device | None = None, kernel: str | None = None) -> None:
        self.experts_on = experts_on
        self.kernel = kernel

    @abstractmethod
    def experts(self, make: Callable[[range], Experts], num_experts: int) -> Experts:
        """The experts of a mixture. make: makes some consecutive ones of `num_experts`."""

    @abstractmethod
    def embedding(self, options: TableOptions, *, std: float) -> Embedding:
        """A module: the embedding, of normal numbers."""

    @abstractmethod
    def softmax(self, options: TableOptions, *, num_samples: int, cutoffs: Sequence[int]) -> Softmax:
        """The softmax over all words: with cutoffs an adaptive one, else one that may look at samples."""


class Everything(Holding):
    """The holding of one process."""

    def experts(self, make: Callable[[range], Experts], num_experts: int) -> Experts:
        return make(range(num_experts))

    def embedding(self, options: TableOptions, *, std: float) -> Embedding:
        table = nn.Embedding(options.vocab_size, options.width, device=options.device, dtype=options.dtype)
        nn.init.normal_(table.weight, std=std)
        return table

    def softmax(self, options: TableOptions, *, num_samples: int, cutoffs: Sequence[int]) -> Softmax:
        if cutoffs:
            assert not num_samples
            return AdaptiveSoftmax(**vars(options), cutoffs=cutoffs)
        return OutputSoftmax(**vars(options), num_samples=num_samples)


EVERYTHING = Everything()
