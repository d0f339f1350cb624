"""Experts spread over ranks: tokens travel to the experts they chose, and back (section 3.1 of the paper)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..moe.dispatch import Plan, dispatch, sum_rows
from ..moe.experts.experts import Experts
from ..moe.routing import Routing, count
from .counts import Counts, Departure, Peers, agree_on_counts, depart
from .exchange import receive, send
from .placement import experts_of, firsts, split


class ExpertParallel(Experts):
    """Experts of which each rank of a mesh holds some; `experts(x_TD, routing) -> y_TD` of its own tokens.

    A token is sent once to each rank that has an expert of it, however many these are. There the experts'
    outputs are weighted and added up, and the sum comes back: as many rows return as went. A weight's
    gradient is made where its expert is, of the output and the output's gradient, and returns as one number.
    The host waits once in a forward pass, for the counts.

    On a mesh of nodes and the ranks of each, a token crosses once to each *node* that has an expert of it, to
    the rank that stands there where its own stands at home; from there it goes once to each rank of the node
    that has one. What comes back to a node is the sum over the other one's ranks. Experts stand as they do
    over the same ranks in one dimension.

    Tokens may be cut into pieces: while one is computed the next one travels, forward and backward. The
    experts are then called once for each piece, with so much smaller batches.

    All ranks of the mesh call it together, and equally often in backward: a rank without tokens too, with
    T = 0. Which layer's tokens need a gradient is to be the same everywhere. The gradients of the experts are
    those of the sum of all ranks' losses.

    experts: this rank's, those that `experts_of` tells. num_experts: of all ranks. mesh: of one dimension, or
    of two: nodes, and the ranks of a node. num_pieces: 1 for none under way while another is computed.
    """

    def __init__(self, *, experts: Experts, num_experts: int, mesh: DeviceMesh, num_pieces: int = 1) -> None:
        super().__init__()
        if mesh.ndim > 2:
            raise ValueError(f"mesh ({mesh.ndim} dimensions) must have one or two; take them by their names")
        rank = mesh.mesh.flatten().tolist().index(mesh.get_rank())
        own = experts_of(rank, num_experts=num_experts, num_ranks=mesh.size())
        if experts.num_experts != len(own):
            raise ValueError(
                f"experts.num_experts ({experts.num_experts}) must be {len(own)}: "
                f"rank {rank} has experts {own.start} to {own.stop - 1}"
            )
        self.num_experts = num_experts
        self.mesh = mesh
        self.experts = experts
        self.num_pieces = num_pieces
        self.rank = rank

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, ranks={' x '.join(map(str, self.mesh.shape))}"

    def ops_per_pair(self) -> int:
        return self.experts.ops_per_pair()

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        num_ranks = self.mesh.size()
        first_W = firsts(self.num_experts, num_ranks, device=x_TD.device)
        to_ranks = depart(routing, first_W, num_pieces=self.num_pieces)
        if self.mesh.ndim == 2:
            return self._over_nodes(x_TD, routing, to_ranks, first_W)
        group = self.mesh.get_group()
        (counts,) = agree_on_counts([to_ranks], [Peers(group=group, ranks=range(num_ranks))], rank=self.rank)
        computes = [self.experts] * self.num_pieces
        return _travel(x_TD, routing, to_ranks, counts, group, computes, self.experts.num_experts)

    def _over_nodes(self, x_TD: Tensor, routing: Routing, to_ranks: Departure, first_W: Tensor) -> Tensor:
        """By way of the rank that stands in the other node where this one stands in its own."""
        num_ranks, per_node = self.mesh.size(), self.mesh.size(1)
        between, within = self.mesh.get_group(0), self.mesh.get_group(1)
        place = self.rank % per_node
        node = range(self.rank - place, self.rank - place + per_node)
        to_nodes = depart(routing, first_W[::per_node].contiguous(), num_pieces=self.num_pieces)
        counts, counts_within = agree_on_counts(
            [to_nodes, to_ranks],
            [Peers(group=between, ranks=range(place, num_ranks, per_node)), Peers(group=within, ranks=node)],
            rank=self.rank,
        )

        def compute(counts_of_piece: Counts, rows_RD: Tensor, arrived: Routing) -> Tensor:
            onward = depart(arrived, first_W[node.start : node.stop + 1] - first_W[node.start], num_pieces=1)
            num_own = self.experts.num_experts
            return _travel(rows_RD, arrived, onward, [counts_of_piece], within, [self.experts], num_own)

        computes = [partial(compute, counts_of_piece) for counts_of_piece in counts_within]
        shares = [experts_of(rank, num_experts=self.num_experts, num_ranks=num_ranks) for rank in node]
        return _travel(x_TD, routing, to_nodes, counts, between, computes, sum(map(len, shares)))


def _travel(
    x_TD: Tensor,
    routing: Routing,
    departure: Departure,
    counts: Sequence[Counts],
    group: dist.ProcessGroup,
    computes: Sequence[Callable[[Tensor, Routing], Tensor]],
    num_experts: int,
) -> Tensor:
    """Send tokens to the members of a group, compute there with the experts behind each, and come back.

    counts, computes: of each piece. num_experts: behind this rank.
    """
    tokens = [len(part) for part in split(len(x_TD), len(counts))]
    plans, there, back = [], [], []
    pair = 0
    for piece, x_PD in enumerate(x_TD.split(tokens) if len(tokens) > 1 else [x_TD]):
        pairs = slice(pair, pair + counts[piece].pairs.num_sent)
        plan = _load(departure, counts[piece], pairs, first_token=sum(tokens[:piece]), num_tokens=len(x_PD))
        given = [dispatch(x_PD, plan), routing.weight_N[departure.order_N[pairs]], departure.code_N[pairs]]
        there.append(send(given, [counts[piece].rows, counts[piece].pairs, counts[piece].pairs], group))
        plans.append(plan)
        pair = pairs.stop
    for each, compute, travelling in zip(counts, computes, there, strict=True):
        rows_RD, weight_Q, code_Q = receive(travelling)
        arrived = _arrived(code_Q, weight_Q, each.rows.num_received, routing, num_experts)
        back.append(send([compute(rows_RD, arrived)], [each.rows.reversed()], group))
    pieces = [sum_rows(receive(travelling)[0], plan) for travelling, plan in zip(back, plans, strict=True)]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _load(departure: Departure, counts: Counts, pairs: slice, *, first_token: int, num_tokens: int) -> Plan:
    """The plan of a piece's rows that go, by rank."""
    num_rows = counts.rows.num_sent
    place_S = torch.nonzero_static(departure.is_first_N[pairs], size=num_rows).squeeze(1)
    token_S = departure.token_N[pairs][place_S] - first_token
    row_S = token_S.argsort(stable=True)
    return Plan(
        order_N=torch.empty_like(row_S).scatter(0, row_S, torch.arange(num_rows, device=row_S.device)),
        row_N=row_S,
        token_N=token_S,
        end_E=row_S.new_full((1,), num_rows),
        pairs_T=count(token_S, num_tokens),
        pairs_per_token=None,
    )


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
