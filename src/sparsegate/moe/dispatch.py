"""Rows in expert order, and back: the plan of a routing, dispatch, combine.

Experts use it for their tokens, a hierarchical gate for the tokens of its groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import autocast_off
from .routing import Routing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each token-expert pair of a Routing stands among the rows, which are sorted by expert.

    order_N: the pair of each row. row_N: the row of each pair, the inverse permutation. token_N: the token
    of each row. end_E: one past the last row of each expert, int64. Rows past `end_E[-1]` belong to unused
    pairs. pairs_T, pairs_per_token: of the routing.
    """

    order_N: Tensor
    row_N: Tensor
    token_N: Tensor
    end_E: Tensor
    pairs_T: Tensor
    pairs_per_token: int | None


def plan_rows(routing: Routing) -> Plan:
    """Sort the pairs of a routing by expert; the order within an expert is that of the tokens."""
    expert_N, order_N = routing.expert_N.sort(stable=True)
    device = expert_N.device
    row_N = torch.empty_like(order_N).scatter(0, order_N, torch.arange(order_N.numel(), device=device))
    expert_E = torch.arange(routing.num_experts, device=device)
    return Plan(
        order_N=order_N,
        row_N=row_N,
        token_N=routing.token_N[order_N],
        end_E=torch.searchsorted(expert_N, expert_E, right=True),
        pairs_T=routing.pairs_T,
        pairs_per_token=routing.pairs_per_token,
    )


def dispatch(x_TD: Tensor, plan: Plan) -> Tensor:
    """Copy each token to the rows of its pairs: rows_ND in expert order."""
    return _Gather.apply(x_TD, plan.token_N, plan.row_N, plan.pairs_T, plan.pairs_per_token)


def in_pair_order(rows_ND: Tensor, plan: Plan) -> Tensor:
    """Rows put back in the order of the routing's pairs."""
    return _Permute.apply(rows_ND, plan.row_N, plan.order_N)


def sum_rows(rows_ND: Tensor, plan: Plan) -> Tensor:
    """Sum each token's rows: y_TD, the transpose of `dispatch`. The rows are all used: end_E[-1] = N."""
    return _Sum.apply(rows_ND, plan.token_N, plan.row_N, plan.pairs_T, plan.pairs_per_token)


def combine(rows_ND: Tensor, plan: Plan, weight_N: Tensor) -> Tensor:
    """Sum each token's rows, multiplied by the gate's weights, in the wider dtype of the two: y_TD.

    Rows are put back in the order of the pairs first, so that the sum is deterministic. Where every token has
    K pairs it is one product for each token, and no weighted copy of the rows is made. Autocast would narrow
    it.
    """
    dtype = torch.promote_types(rows_ND.dtype, weight_N.dtype)
    weight_N, k = weight_N.to(dtype), plan.pairs_per_token
    if k is None:
        weighted_ND = rows_ND.to(dtype) * _Permute.apply(weight_N, plan.order_N, plan.row_N)[:, None]
        return _Sum.apply(weighted_ND, plan.token_N, plan.row_N, plan.pairs_T, k)
    pairs_TKD = in_pair_order(rows_ND, plan).to(dtype).unflatten(0, (-1, k))
    with autocast_off(rows_ND.device):
        return torch.bmm(weight_N.unflatten(0, (-1, 1, k)), pairs_TKD).squeeze(1)


class _Gather(torch.autograd.Function):
    """x_TD -> rows_ND, each token copied to its rows; the transpose of `_Sum`.

    Autograd's own transpose of an index is an index_add: slower, and in random order on a GPU. Each of the
    two is the other's backward, so that they can be differentiated any number of times.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_TD: Tensor, token_N: Tensor, row_N: Tensor, pairs_T: Tensor, pairs_per_token: int | None
    ) -> Tensor:
        return x_TD.index_select(0, token_N)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *indices, ctx.pairs_per_token = inputs
        ctx.save_for_backward(*indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Sum.apply(*grads, *ctx.saved_tensors, ctx.pairs_per_token), None, None, None, None


class _Sum(torch.autograd.Function):
    """rows_ND -> y_TD, each token's rows summed; the transpose of `_Gather`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows_ND: Tensor, token_N: Tensor, row_N: Tensor, pairs_T: Tensor, pairs_per_token: int | None
    ) -> Tensor:
        if pairs_per_token is not None and rows_ND.is_cpu:
            return F.embedding_bag(row_N.view(-1, pairs_per_token), rows_ND, mode="sum")
        pairs_ND = rows_ND.index_select(0, row_N)
        if pairs_per_token is None:
            # In the order of the pairs on every device, unlike an index_add. Its checks would read lengths.
            wide = torch.promote_types(pairs_ND.dtype, torch.float32)
            y_TD = torch.segment_reduce(pairs_ND.to(wide), "sum", lengths=pairs_T, unsafe=True)
            return y_TD.to(pairs_ND.dtype)
        return pairs_ND.reshape(-1, pairs_per_token, rows_ND.shape[1]).sum(dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *indices, ctx.pairs_per_token = inputs
        ctx.save_for_backward(*indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Gather.apply(*grads, *ctx.saved_tensors, ctx.pairs_per_token), None, None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; its backward is the inverse permutation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        return value_ND.index_select(0, order_N)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        order_N, inverse_N = ctx.saved_tensors
        return _Permute.apply(*grads, inverse_N, order_N), None, None
