"""What of a model a rank holds: its share of the experts, perhaps of the words, and everything else."""

from collections.abc import Callable, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..models.holding import EVERYTHING, Embedding, Holding, TableOptions
from ..models.softmax import Softmax
from ..moe.experts.experts import Experts
from .expert_parallel import ExpertParallel
from .placement import experts_of
from .vocabulary import ShardedEmbedding, ShardedSoftmax


class HoldingOfRank(Holding):
    """The holding of this rank of a mesh of one dimension. A model that is built with it is spread already.

    nodes, num_pieces: see `spread_experts`. shares_words: whether embedding and softmax are spread as well.
    ValueError, while a model is built: fewer experts than ranks, or fewer words, or words that are spread and
    an adaptive softmax.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        nodes: DeviceMesh | None = None,
        num_pieces: int = 1,
        shares_words: bool = False,
        experts_on: torch.device | None = None,
        kernel: str | None = None,
    ) -> None:
        super().__init__(experts_on=experts_on, kernel=kernel)
        self.mesh = mesh
        self.nodes = nodes
        self.num_pieces = num_pieces
        self.shares_words = shares_words

    def experts(self, make: Callable[[range], Experts], num_experts: int) -> Experts:
        own = experts_of(self.mesh.get_local_rank(), num_experts=num_experts, num_ranks=self.mesh.size())
        return ExpertParallel(
            experts=make(own),
            num_experts=num_experts,
            mesh=self.mesh if self.nodes is None else self.nodes,
            num_pieces=self.num_pieces,
        )

    def embedding(self, options: TableOptions, *, std: float) -> Embedding:
        if not self.shares_words:
            return EVERYTHING.embedding(options, std=std)
        return ShardedEmbedding(**vars(options), std=std, mesh=self.mesh)

    def softmax(self, options: TableOptions, *, num_samples: int, cutoffs: Sequence[int]) -> Softmax:
        if not self.shares_words:
            return EVERYTHING.softmax(options, num_samples=num_samples, cutoffs=cutoffs)
        if cutoffs:
            raise ValueError(
                "training.vocabulary (sharded) must be replicated with model.softmax-cutoffs, whose softmax "
                "is not spread"
            )
        return ShardedSoftmax(**vars(options), num_samples=num_samples, mesh=self.mesh)
