"""Any nn.Module as an expert."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from .experts import RowExperts


class ModuleExperts(RowExperts):
    """Experts that are modules of any kind and size, each mapping rows [R, width] to rows [R, width].

    Every expert runs at every step, on zero rows too: its parameters then always take part in backward, which
    data-parallel training needs. Row counts are read by the host, so this is not for `torch.compile`.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not experts:
            raise ValueError("experts: an empty list; give at least one module")
        self.num_experts = len(experts)
        self.experts = nn.ModuleList(experts)

    def ops_per_pair(self) -> int:
        """Parameters of the mean expert: one multiply-add each, which holds for stacks of linear layers."""
        return sum(p.numel() for p in self.parameters()) // self.num_experts

    def part(self, first: int, end: int) -> "ModuleExperts":
        return ModuleExperts([deepcopy(expert) for expert in self.experts[first:end]])

    def compute_rows(self, rows_ND: Tensor, end_E: Tensor) -> Tensor:
        ends = end_E.tolist()
        parts = [
            expert(rows_ND[start:end])
            for expert, start, end in zip(self.experts, [0, *ends[:-1]], ends, strict=True)
        ]
        unused = rows_ND.new_zeros(rows_ND.shape[0] - ends[-1], rows_ND.shape[1], dtype=parts[0].dtype)
        return torch.cat([*parts, unused])
