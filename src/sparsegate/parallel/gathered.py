"""Gates that choose over a batch, over the batch of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from ..moe.gating.gate import Gate
from ..moe.routing import BalanceSums, Routing
from .exchange import Rows, exchange


class Gathered(Gate):
    """Another gate, which chooses among the tokens of all ranks of a mesh, as one process would.

    Each rank gets the tokens of all, decides for all, and keeps what was decided of its own: as much
    computing as one process has, and the traffic of the inputs. Only in training, and where the gate selects
    over the batch; else every rank decides for itself, as what it evaluates are batches of its own. The first
    rank answers for the sums of all tokens, the others' are 0: added up they are those of the batch. Draws
    that the gate makes by itself are the same on all ranks.

    All ranks call it together, and give a mask and noise all or none. mesh: of one dimension.
    """

    def __init__(self, gate: Gate, *, mesh: DeviceMesh) -> None:
        super().__init__()
        self.gate = gate
        self.mesh = mesh
        self.num_experts = gate.num_experts
        self.pairs_per_token = gate.pairs_per_token
        self.pairs_vary = gate.pairs_vary
        self.noise_width = gate.noise_width

    @property
    def selects_over_batch(self) -> bool:
        return self.gate.selects_over_batch

    @property
    def sees_later_tokens(self) -> bool:
        return self.gate.sees_later_tokens

    def ops_per_token(self) -> int:
        return self.gate.ops_per_token()

    def after_step(self, sums: BalanceSums) -> None:
        self.gate.after_step(sums)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        if not (self.training and self.selects_over_batch):
            return self.gate(x_TD, mask_T, noise)
        if noise is None and self.noise_width:
            noise = torch.randn(x_TD.shape[0], self.noise_width, dtype=x_TD.dtype, device=x_TD.device)
        rank, group = self.mesh.get_local_rank(), self.mesh.get_group()
        sizes_W, seed = _sizes_and_seed(x_TD, group)
        of_all = _of_all_ranks([x_TD, mask_T, noise], sizes_W, rank, group)
        with torch.random.fork_rng([x_TD.device] if x_TD.is_cuda else []):
            torch.manual_seed(seed)
            routing = self.gate(*of_all)
        first = sum(sizes_W[:rank])
        return _of_tokens(routing, first, first + sizes_W[rank], answers_for_sums=rank == 0)


def _sizes_and_seed(x_TD: Tensor, group: dist.ProcessGroup) -> tuple[list[int], int]:
    """Number of tokens of each rank, and the first rank's draw, as the host's."""
    own = torch.tensor([x_TD.shape[0], int(torch.randint(1 << 62, ()))], device=x_TD.device)
    all_W2 = own.new_empty(dist.get_world_size(group), 2)
    dist.all_gather(list(all_W2), own, group=group)
    sizes_W, seeds_W = all_W2.T.tolist()
    return sizes_W, seeds_W[0]


def _of_all_ranks(
    tensors: list[Tensor | None], sizes_W: list[int], rank: int, group: dist.ProcessGroup
) -> list[Tensor | None]:
    """Each tensor's rows of all ranks, in their order: an exchange in which every rank gets a copy."""
    num_ranks = len(sizes_W)
    rows = Rows(sent_W=(sizes_W[rank],) * num_ranks, received_W=tuple(sizes_W))
    given = [tensor for tensor in tensors if tensor is not None]
    copies = [tensor.expand(num_ranks, *tensor.shape).flatten(0, 1) for tensor in given]
    gathered = iter(exchange(copies, [rows] * len(given), group))
    return [None if tensor is None else next(gathered) for tensor in tensors]


def _of_tokens(routing: Routing, first: int, end: int, *, answers_for_sums: bool) -> Routing:
    """The routing of some consecutive tokens: their pairs stand together."""
    if (k := routing.pairs_per_token) is not None:
        begin_pair, end_pair = first * k, end * k
    else:
        before_T = torch.cat([routing.pairs_T.new_zeros(1), routing.pairs_T.cumsum(0)])
        begin_pair, end_pair = before_T[[first, end]].tolist()
    pairs = slice(begin_pair, end_pair)
    return Routing(
        token_N=routing.token_N[pairs] - first,
        expert_N=routing.expert_N[pairs],
        weight_N=routing.weight_N[pairs],
        pairs_T=routing.pairs_T[first:end],
        sums=routing.sums if answers_for_sums else pytree.tree_map(torch.zeros_like, routing.sums),
        num_experts=routing.num_experts,
        pairs_per_token=k,
    )
