"""Selection over a batch: each expert takes the tokens that suit it best (eq. 18 of the paper)."""

from typing import TypeVar, cast

import torch
from torch import Tensor

from ..routing import count

Count = TypeVar("Count", int, Tensor)


def batchwise(value_TE: Tensor, segment_T: Tensor, *, num_segments: int, k: int) -> Tensor:
    """M_batchwise, eq. 18: which tokens are among the top m of each expert, bool [T, E].

    value_TE: scores. segment_T: int64, which tokens compete with each other; `num_segments` for tokens that
    take no part. m is `tokens_per_expert` of a segment's tokens, so that a token is chosen k times on
    average. Of equal scores the first token's is the higher.
    """
    num_experts = value_TE.shape[1]
    count_S = count(segment_T, num_segments)
    most_S = _share(count_S, k, num_experts).clamp_min(1).minimum(count_S)
    # The tokens that take no part are the last segment, and none of them is chosen.
    most_S = torch.cat([most_S, most_S.new_zeros(1)])
    return rank_in_segment(value_TE, segment_T, num_segments=num_segments) < most_S[segment_T][:, None]


def tokens_per_expert(num_tokens: int, *, k: int, num_experts: int) -> int:
    """m = k T / E rounded to the nearest number, at least 1 and at most T: the paper leaves rounding open.

    With fewer than E / k tokens every expert still takes one, and a token has more than k experts.
    """
    return smaller(num_tokens, cast(int, torch.sym_max(1, _share(num_tokens, k, num_experts))))


def smaller(first: int, second: int) -> int:
    """The smaller of two sizes, in compiled graphs for all of their values."""
    return cast(int, torch.sym_min(first, second))


def rank_in_segment(value_TE: Tensor, segment_T: Tensor, *, num_segments: int) -> Tensor:
    """Place of each value in its column among the tokens of its segment, from 0 for the largest: [T, E].

    segment_T: int64, from 0 to `num_segments`. Equal values stand in the order of their tokens.
    """
    by_value_TE = value_TE.detach().argsort(dim=0, descending=True, stable=True)
    # Sorting is stable: by value, and then by segment, leaves each segment sorted by value.
    order_TE = by_value_TE.gather(0, segment_T[by_value_TE].argsort(dim=0, stable=True))
    place_T = torch.arange(segment_T.shape[0], device=segment_T.device)
    size_S = count(segment_T, num_segments + 1)
    place_in_segment_T = place_T - (size_S.cumsum(0) - size_S)[segment_T.sort().values]
    return torch.empty_like(order_TE).scatter(0, order_TE, place_in_segment_T[:, None].expand_as(order_TE))


def blocks(num_tokens: int, scope: int | None, mask_T: Tensor | None, device: torch.device) -> Tensor:
    """The segment of each token where `scope` consecutive tokens compete; padding is in none.

    A scope of None is one block of all tokens. There are `num_blocks` segments.
    """
    token_T = torch.arange(num_tokens, device=device)
    block_T = token_T * 0 if scope is None else token_T.div(scope, rounding_mode="floor")
    return block_T if mask_T is None else block_T.masked_fill(~mask_T, num_blocks(num_tokens, scope))


def num_blocks(num_tokens: int, scope: int | None) -> int:
    """Number of blocks of `scope` tokens, the last of which may be shorter."""
    return 1 if scope is None else (num_tokens + scope - 1) // scope


def most_pairs(num_tokens: int, scope: int | None, *, k: int, num_experts: int) -> int:
    """Number of pairs that `batchwise` chooses in blocks without padding; with padding it chooses fewer."""
    if scope is None:
        return num_experts * tokens_per_expert(num_tokens, k=k, num_experts=num_experts)
    whole = num_tokens // scope * tokens_per_expert(scope, k=k, num_experts=num_experts)
    return num_experts * (whole + tokens_per_expert(num_tokens % scope, k=k, num_experts=num_experts))


def require_scope(scope: int | None) -> None:
    """Refuse a scope without tokens."""
    if scope is not None and scope < 1:
        raise ValueError(f"scope ({scope}) must be at least 1 token, or None for all tokens of a call")


def _share(num_tokens: Count, k: int, num_experts: int) -> Count:
    return (2 * k * num_tokens + num_experts) // (2 * num_experts)
