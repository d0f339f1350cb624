"""Who sends how many rows to whom: counted, told, and known to both ends before any row moves."""

from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.routing import Routing, count
from .exchange import Rows
from .placement import firsts


@dataclass(frozen=True, kw_only=True)
class Departure:
    """The pairs of a routing sorted by the rank they go to, those that go nowhere at the end.

    Tokens may be cut into pieces, which travel one after the other: then the pairs of one piece stand before
    those of the next.

    order_N: the pair at each place. token_N: its token. code_N: int32, its expert among those of the rank,
    doubled, and one more where it is the first pair of its token there: from that the rank knows which pairs
    share a row. is_first_N: that. rows_PW, pairs_PW: int64, number of rows and of pairs for each rank, by
    piece. num_used, num_first: int64, one element, of pairs that go somewhere, and of first ones of these.
    """

    order_N: Tensor
    token_N: Tensor
    code_N: Tensor
    is_first_N: Tensor
    rows_PW: Tensor
    pairs_PW: Tensor
    num_used: Tensor
    num_first: Tensor

    def fits(self) -> Tensor:
        """Whether the numbers are those of the pairs: bool, one element."""
        return (self.pairs_PW.sum() == self.num_used) & (self.rows_PW.sum() == self.num_first)


def depart(routing: Routing, first_W: Tensor, *, num_pieces: int) -> Departure:
    """first_W: int64, the first expert of each rank, and then the number of all."""
    num_ranks, num_tokens = len(first_W) - 1, len(routing.pairs_T)
    rank_N = torch.searchsorted(first_W, routing.expert_N, right=True) - 1
    num_journeys = num_pieces * num_ranks
    journey_N = rank_N
    if num_pieces > 1:
        first_P = firsts(num_tokens, num_pieces, device=rank_N.device)
        piece_N = torch.searchsorted(first_P, routing.token_N.contiguous(), right=True) - 1
        journey_N = torch.where(rank_N < num_ranks, piece_N * num_ranks + rank_N, num_journeys)
    # The sort is stable and pairs stand in the order of tokens: those of one token and rank are neighbours.
    journey_N, order_N = journey_N.sort(stable=True)
    token_N = routing.token_N[order_N]
    is_first_N = torch.ones_like(token_N, dtype=torch.bool)
    is_first_N[1:] = (token_N[1:] != token_N[:-1]) | (journey_N[1:] != journey_N[:-1])
    local_N = routing.expert_N[order_N] - first_W[rank_N[order_N]]
    is_used_N = journey_N < num_journeys
    return Departure(
        order_N=order_N,
        token_N=token_N,
        code_N=(2 * local_N + is_first_N).to(torch.int32),
        is_first_N=is_first_N,
        rows_PW=count(journey_N.where(is_first_N, num_journeys), num_journeys).view(num_pieces, num_ranks),
        pairs_PW=count(journey_N, num_journeys).view(num_pieces, num_ranks),
        num_used=is_used_N.sum(),
        num_first=(is_used_N & is_first_N).sum(),
    )


@dataclass(frozen=True, kw_only=True)
class Peers:
    """A group, and the numbers of its members among all ranks of the mesh."""

    group: dist.ProcessGroup
    ranks: range


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many rows and pairs travel in a group."""

    rows: Rows
    pairs: Rows


def agree_on_counts(departures: list[Departure], peers: list[Peers], *, rank: int) -> list[list[Counts]]:
    """The counts in each group, piece by piece, known to both ends: the one time that the host waits.

    departures: to the members of the first group. With a second group also to all ranks: those behind the
    first member, then those behind the second, and so on. A rank then sends in the second group what came to
    it for each of its members. rank: this one's number.

    RuntimeError: on all ranks alike, before any row has moved, where counts do not fit. Another size than was
    agreed on is garbage with Gloo, and a hang or garbage with NCCL.
    """
    size = len(peers[0].ranks)
    # 2: rows and pairs. The last axis: for a member itself, and for each rank behind it.
    counts_W2PB = torch.cat(
        [
            torch.stack([each.rows_PW, each.pairs_PW]).unflatten(2, (size, -1)).movedim(2, 0)
            for each in departures
        ],
        dim=3,
    )
    own = torch.stack([torch.where(each.fits(), -1, rank) for each in departures]).amax()
    told, culprits = [], [own]
    for each in peers:
        received_W2PB, is_wrong_W = _tell(counts_W2PB, each.group)
        told += [counts_W2PB[..., 0], received_W2PB[..., 0]]
        rank_W = torch.arange(each.ranks.start, each.ranks.stop, each.ranks.step, device=is_wrong_W.device)
        culprits.append(rank_W.where(is_wrong_W, -1).amax())
        counts_W2PB = received_W2PB[..., 1:].sum(dim=0).movedim(2, 0)[..., None]
    # One that is seen early comes first: what it altered others have added up and told in good faith.
    culprits_of_all = torch.stack(culprits)
    for each in peers:
        dist.all_reduce(culprits_of_all, op=dist.ReduceOp.MAX, group=each.group)
    numbers = iter(torch.cat([*(each.flatten() for each in told), culprits_of_all]).tolist())
    tables = [list(islice(numbers, each.numel())) for each in told]
    if found := [number for number in numbers if number >= 0]:
        raise RuntimeError(
            f"the numbers of rows from rank {found[0]} do not fit its tokens, or were altered on their way; "
            "no row has been sent: look for a fault of that rank's memory or network"
        )
    num_pieces = len(departures[0].rows_PW)
    return [
        _counts(sent, received, num_pieces) for sent, received in zip(tables[::2], tables[1::2], strict=True)
    ]


def _counts(sent_W2P: list[int], received_W2P: list[int], num_pieces: int) -> list[Counts]:
    """Of one group, piece by piece."""
    rows = [
        Rows(
            sent_W=tuple(sent_W2P[which :: 2 * num_pieces]),
            received_W=tuple(received_W2P[which :: 2 * num_pieces]),
        )
        for which in range(2 * num_pieces)
    ]
    return [Counts(rows=rows[piece], pairs=rows[num_pieces + piece]) for piece in range(num_pieces)]


def _tell(sent_W2PB: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """What the members of a group have for this one; of which of them it cannot be right."""
    sent_WC = sent_W2PB.flatten(1)
    sent_WC = torch.cat([sent_WC, _check_sum(sent_WC)], dim=1)
    received_WC = torch.empty_like(sent_WC)
    dist.all_to_all_single(received_WC, sent_WC, group=group)
    received_W2PB = received_WC[:, :-1].view(sent_W2PB.shape)
    rows_WPB, pairs_WPB = received_W2PB.unbind(dim=1)
    is_altered_W = (received_WC[:, -1:] != _check_sum(received_WC[:, :-1])).squeeze(1)
    return received_W2PB, is_altered_W | ((rows_WPB < 0) | (pairs_WPB < rows_WPB)).flatten(1).any(dim=1)


def _check_sum(counts_WC: Tensor) -> Tensor:
    place_C = torch.arange(counts_WC.shape[1], device=counts_WC.device)
    return (counts_WC * (1_000_003 * place_C + 31)).sum(dim=1, keepdim=True) + 17
