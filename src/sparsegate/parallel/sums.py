"""Sums over the ranks of a group: what the balance losses of the global batch are functions of."""

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

Sums = TypeVar("Sums")


def sum_over_ranks(sums: Sums, group: dist.ProcessGroup | None = None) -> Sums:
    """Add up what each rank has: BalanceSums by layer, or any nest of tensors; all ranks get the total.

    Its gradient is that of the rank's own addend, with the other ranks' as constants. So a loss of the total
    that stands in every rank's loss, once, has the gradient of one process on the joined batch when the
    ranks' gradients are added up; where they are averaged, multiply all of the rank's loss by the number of
    ranks. group: None is all ranks.
    """
    leaves, spec = pytree.tree_flatten(sums)
    if not leaves:
        return sums
    totals = _SumOverRanks.apply(group, *leaves)
    return cast(Sums, pytree.tree_unflatten(list(totals), spec))


class _SumOverRanks(torch.autograd.Function):
    """One collective for each dtype, whatever the number of tensors."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, *leaves: Tensor) -> tuple[Tensor, ...]:
        totals: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            places = [place for place, leaf in enumerate(leaves) if leaf.dtype == dtype]
            flat = torch.cat([leaves[place].flatten() for place in places])
            dist.all_reduce(flat, group=group)
            parts = flat.split([leaves[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                # Autograd takes no views of one tensor as several outputs that may be changed in place.
                totals[place] = part.clone().view(leaves[place].shape)
        return tuple(totals[place] for place in range(len(leaves)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *grads
