"""Balance sums over a whole text."""

from collections.abc import Mapping

import torch
from torch.utils import _pytree as pytree

from ..moe.routing import BalanceSums


def add_exactly(total: Mapping[str, BalanceSums], sums: Mapping[str, BalanceSums]) -> dict[str, BalanceSums]:
    """Sums by layer, in float64, outside of inference mode, so that the result is an ordinary tensor."""
    exact = {name: pytree.tree_map(_exact, part) for name, part in sums.items()}
    return {name: total[name] + part if total else part for name, part in exact.items()}


def _exact(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
