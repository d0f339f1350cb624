"""Capacity: a bound on the tokens of each expert, for those who must have one."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..routing import BalanceSums, Routing, count, count_routed
from .batchwise import blocks, num_blocks, rank_in_segment, require_scope
from .gate import Gate


class Capacity(Gate):
    """Another gate, whose experts take ceil(factor * k T / E) tokens each and drop the rest (GShard, Switch).

    Without it no token is dropped, and none should be: this is for comparisons with models that do. A dropped
    pair has no part in the output, and the weights of the token's other experts stay as they are. The balance
    sums tell what the gate asked for, so that losses still see the overload; `num_dropped` counts the pairs
    that were dropped, `num_unrouted` the tokens that lost all of theirs.

    gate: decides as ever, every token for itself. factor: 1 has room for every pair in perfect balance.
    drop: "last" drops the last tokens of the call; "lightest" those of the smallest weight (Riquelme et al.
    2021 go by the token's largest weight). scope: number of consecutive tokens that compete for room; None:
    all tokens of a call, and with micro-batches or ranks each part's by itself. The bound holds in evaluation
    as well: there, too, a token's output depends on that of others; with "last", of tokens before it alone.
    The gate inside keeps its names in checkpoints, below `gate.gate`.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        factor: float,
        drop: Literal["last", "lightest"] = "last",
        scope: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= factor < math.inf:
            raise ValueError(
                f"factor ({factor}) must be at least 1 and finite; below 1, perfect balance drops tokens"
            )
        if drop not in ("last", "lightest"):
            raise ValueError(f"drop ({drop}) must be last or lightest")
        require_scope(scope)
        self.gate = gate
        self.num_experts = gate.num_experts
        self.pairs_per_token = gate.pairs_per_token
        self.pairs_vary = gate.pairs_vary
        self.noise_width = gate.noise_width
        self.factor = factor
        self.drop: Literal["last", "lightest"] = drop
        self.scope = scope

    @property
    def selects_over_batch(self) -> bool:
        return True

    @property
    def sees_later_tokens(self) -> bool:
        return self.drop == "lightest" or self.gate.sees_later_tokens

    def extra_repr(self) -> str:
        return f"factor={self.factor}, drop={self.drop}, scope={self.scope}"

    def ops_per_token(self) -> int:
        return self.gate.ops_per_token()

    def after_step(self, sums: BalanceSums) -> None:
        self.gate.after_step(sums)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        routing = self.gate(x_TD, mask_T, noise)
        num_tokens, num_experts = x_TD.shape[0], self.num_experts
        segments = num_blocks(num_tokens, self.scope)
        block_T = blocks(num_tokens, self.scope, mask_T, x_TD.device)
        is_used_N = routing.expert_N < num_experts
        # Pairs compete where they share a block and an expert; unused ones are in the last segment.
        segment_N = (block_T[routing.token_N] * num_experts + routing.expert_N).where(
            is_used_N, segments * num_experts
        )
        priority_N = routing.weight_N if self.drop == "lightest" else torch.zeros_like(routing.weight_N)
        rank_N = rank_in_segment(priority_N[:, None], segment_N, num_segments=segments * num_experts)[:, 0]
        is_kept_N = is_used_N & (rank_N < self._room(block_T, segments)[block_T[routing.token_N]])
        sums = BalanceSums(
            **{
                **vars(routing.sums),
                "num_unrouted": routing.sums.num_tokens
                - count_routed(routing.token_N, is_kept_N, num_tokens),
                "num_dropped": routing.sums.num_dropped + (is_used_N & ~is_kept_N).sum(),
            }
        )
        return Routing(
            token_N=routing.token_N,
            expert_N=routing.expert_N.where(is_kept_N, num_experts),
            weight_N=routing.weight_N.where(is_kept_N, 0.0),
            pairs_T=routing.pairs_T,
            sums=sums,
            num_experts=num_experts,
            pairs_per_token=routing.pairs_per_token,
        )

    def _room(self, block_T: Tensor, segments: int) -> Tensor:
        """ceil(factor * k T / E) of the real tokens of each block; padding is the last one."""
        real_S = count(block_T, segments + 1).to(torch.float64)
        # A factor such as 1.1 is no binary fraction: 10 * 1.1 is more than 11.
        return (real_S * self.factor * self.pairs_per_token / self.num_experts - 1e-9).ceil().to(torch.int64)
