"""Experts spread over ranks: tokens travel to the experts they chose, and back (section 3.1 of the paper)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..moe.dispatch import Plan, dispatch, sum_rows
from ..moe.experts.experts import Experts
from ..moe.routing import Routing, count
from .exchange import Rows, exchange
from .placement import experts_of, first_experts


class ExpertParallel(Experts):
    """Experts of which each rank of a mesh holds some; `experts(x_TD, routing) -> y_TD` of its own tokens.

    A token is sent once to each rank that has an expert of it, however many these are. There the experts'
    outputs are weighted and added up, and the sum comes back: as many rows return as went. A weight's
    gradient is made where its expert is, of the output and the output's gradient, and returns as one number.
    The host waits once in a forward pass, for the counts.

    All ranks of the mesh call it together, and equally often in backward: a rank without tokens too, with
    T = 0. Which layer's tokens need a gradient is to be the same everywhere. The gradients of the experts are
    those of the sum of all ranks' losses.

    experts: this rank's, those that `experts_of` tells. num_experts: of all ranks. mesh: of one dimension.
    """

    def __init__(self, *, experts: Experts, num_experts: int, mesh: DeviceMesh) -> None:
        super().__init__()
        if mesh.ndim != 1:
            raise ValueError(f"mesh ({mesh.ndim} dimensions) must have one; take one of them by its name")
        own = experts_of(mesh.get_local_rank(), num_experts=num_experts, num_ranks=mesh.size())
        if experts.num_experts != len(own):
            raise ValueError(
                f"experts.num_experts ({experts.num_experts}) must be {len(own)}: "
                f"rank {mesh.get_local_rank()} has experts {own.start} to {own.stop - 1}"
            )
        self.num_experts = num_experts
        self.mesh = mesh
        self.experts = experts

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, ranks={self.mesh.size()}"

    def ops_per_pair(self) -> int:
        return self.experts.ops_per_pair()

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        group = self.mesh.get_group()
        departure = _departure(routing, num_ranks=self.mesh.size())
        rows, pairs = _agree_on_counts(departure, group)
        plan, code_P, order_P = _load(departure, rows, pairs, num_tokens=x_TD.shape[0])
        sent = [dispatch(x_TD, plan), routing.weight_N[order_P], code_P]
        rows_RD, weight_Q, code_Q = exchange(sent, [rows, pairs, pairs], group)
        arrived = _arrived(code_Q, weight_Q, rows.num_received, routing, self.experts.num_experts)
        (back_SD,) = exchange([self.experts(rows_RD, arrived)], [rows.reversed()], group)
        return sum_rows(back_SD, plan)


@dataclass(frozen=True, kw_only=True)
class _Departure:
    """The pairs of a routing sorted by the rank they go to, those that go nowhere at the end.

    order_N: the pair at each place. rank_N: where it goes. token_N: its token. code_N: int32, its expert
    among those of the rank, doubled, and one more where it is the first pair of its token there: from that
    the rank knows which pairs share a row. is_first_N: that. rows_W, pairs_W: int64, number of rows and of
    pairs for each rank.
    """

    order_N: Tensor
    rank_N: Tensor
    token_N: Tensor
    code_N: Tensor
    is_first_N: Tensor
    rows_W: Tensor
    pairs_W: Tensor


def _departure(routing: Routing, *, num_ranks: int) -> _Departure:
    num_experts, device = routing.num_experts, routing.expert_N.device
    first_W = first_experts(num_experts=num_experts, num_ranks=num_ranks, device=device)
    rank_N = torch.searchsorted(first_W, routing.expert_N, right=True) - 1
    # The sort is stable and pairs stand in the order of tokens: those of one token and rank are neighbours.
    rank_N, order_N = rank_N.sort(stable=True)
    token_N = routing.token_N[order_N]
    is_first_N = torch.ones_like(token_N, dtype=torch.bool)
    is_first_N[1:] = (token_N[1:] != token_N[:-1]) | (rank_N[1:] != rank_N[:-1])
    local_N = routing.expert_N[order_N] - first_W[rank_N]
    return _Departure(
        order_N=order_N,
        rank_N=rank_N,
        token_N=token_N,
        code_N=(2 * local_N + is_first_N).to(torch.int32),
        is_first_N=is_first_N,
        rows_W=count(rank_N.where(is_first_N, num_ranks), num_ranks),
        pairs_W=count(rank_N, num_ranks),
    )


def _agree_on_counts(departure: _Departure, group: dist.ProcessGroup) -> tuple[Rows, Rows]:
    """Numbers of rows and of pairs, known to both ends: the one time that the host waits.

    RuntimeError: on all ranks alike, before any row has moved, where counts do not fit.
    """
    rows_W, pairs_W = departure.rows_W, departure.pairs_W
    sent_W3 = torch.stack([rows_W, pairs_W, _check_sum(rows_W, pairs_W)], dim=1)
    received_W3 = torch.empty_like(sent_W3)
    dist.all_to_all_single(received_W3, sent_W3, group=group)
    culprit = _culprit(departure, received_W3, dist.get_rank(group))
    dist.all_reduce(culprit, op=dist.ReduceOp.MAX, group=group)
    *numbers, rank = torch.cat([sent_W3[:, :2].T.flatten(), received_W3[:, :2].T.flatten(), culprit]).tolist()
    if rank >= 0:
        raise RuntimeError(
            f"the numbers of rows from rank {rank} do not fit its tokens, or were altered on their way; no "
            "row has been sent: look for a fault of that rank's memory or network"
        )
    size = len(rows_W)
    rows_out, pairs_out, rows_in, pairs_in = (tuple(numbers[i * size : (i + 1) * size]) for i in range(4))
    return Rows(sent_W=rows_out, received_W=rows_in), Rows(sent_W=pairs_out, received_W=pairs_in)


def _check_sum(rows_W: Tensor, pairs_W: Tensor) -> Tensor:
    return 1_000_003 * rows_W + 31 * pairs_W + 17


def _culprit(departure: _Departure, received_W3: Tensor, rank: int) -> Tensor:
    """The last rank whose counts cannot be right, as far as this one sees; -1 for none: int64 [1].

    Another size than was agreed on is garbage with Gloo, and a hang or garbage with NCCL.
    """
    rows_W, pairs_W, check_W = received_W3.unbind(dim=1)
    is_wrong_W = (check_W != _check_sum(rows_W, pairs_W)) | (rows_W < 0) | (pairs_W < rows_W)
    is_used_N = departure.rank_N < len(rows_W)
    is_own_wrong = (departure.pairs_W.sum() != is_used_N.sum()) | (
        departure.rows_W.sum() != (is_used_N & departure.is_first_N).sum()
    )
    rank_W = torch.arange(len(rows_W), device=rows_W.device)
    return torch.where(is_wrong_W | (is_own_wrong & (rank_W == rank)), rank_W, -1).amax()[None]


def _load(departure: _Departure, rows: Rows, pairs: Rows, *, num_tokens: int) -> tuple[Plan, Tensor, Tensor]:
    """The plan of the rows that go, by rank; of each pair that goes its code and its place in the routing."""
    num_rows, num_pairs = rows.num_sent, pairs.num_sent
    is_first_P = departure.is_first_N[:num_pairs]
    token_S = departure.token_N[torch.nonzero_static(is_first_P, size=num_rows).squeeze(1)]
    row_S = token_S.argsort(stable=True)
    plan = Plan(
        order_N=torch.empty_like(row_S).scatter(0, row_S, torch.arange(num_rows, device=row_S.device)),
        row_N=row_S,
        token_N=token_S,
        end_E=departure.rows_W.cumsum(0),
        pairs_T=count(token_S, num_tokens),
        pairs_per_token=None,
    )
    return plan, departure.code_N[:num_pairs], departure.order_N[:num_pairs]


def _arrived(code_Q: Tensor, weight_Q: Tensor, num_rows: int, routing: Routing, num_experts: int) -> Routing:
    """The routing of the rows that came, over this rank's experts; its sums are of the rank's own tokens."""
    row_Q = (code_Q & 1).cumsum(0) - 1
    return Routing(
        token_N=row_Q,
        expert_N=(code_Q >> 1).to(torch.int64),
        weight_N=weight_Q,
        pairs_T=count(row_Q, num_rows),
        sums=routing.sums,
        num_experts=num_experts,
        pairs_per_token=None,
    )
