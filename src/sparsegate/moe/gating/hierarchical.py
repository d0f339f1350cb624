"""Hierarchical gating (appendix B of the paper): a gate over groups, and a gate in each group."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import Plan, dispatch, in_pair_order, plan_rows
from ..kernels.grouped import grouped_product
from ..precision import autocast_off
from ..routing import BalanceSums, Routing, count_by_expert, sum_by_expert
from .gate import Gate, gate_dtype, without_padding
from .noisy_topk import Choice, NoisyTopK, choose


class Hierarchical(Gate):
    """G(x)_ij = G_primary(x)_i G_i(x)_j over num_groups groups of equally many experts (eq. 12).

    Noisy top-k gating at both levels. Only the chosen groups' gates are computed, by one grouped product over
    all of them; memory grows with T * (groups + k_primary * (width + experts of a group)), never with T * E.
    Expert j of group i is expert i * (num_experts / num_groups) + j of the routing. With k_primary = 1 the
    group's weight is always 1, and only the balance losses train the primary gate.

    Importance and load are those of eq. 13 and 14, over all experts together. Noise is
    [T, num_groups + k_primary * experts of a group]: the primary gate's, then that of each chosen group, the
    best one first. All weights start at zero, as in a flat gate.

    width: of the input. k_primary: groups per token. k_secondary: experts per token in each of these groups.
    noise_epsilon: added to the noise's standard deviation at both levels.
    """

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        num_groups: int,
        k_primary: int,
        k_secondary: int,
        noise_epsilon: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_hierarchy(
            num_experts=num_experts, num_groups=num_groups, k_primary=k_primary, k_secondary=k_secondary
        )
        group_size = num_experts // num_groups
        self.num_experts = num_experts
        self.pairs_per_token = k_primary * k_secondary
        self.noise_width = num_groups + k_primary * group_size
        self.primary = NoisyTopK(
            width=width,
            num_experts=num_groups,
            k=k_primary,
            noise_epsilon=noise_epsilon,
            device=device,
            dtype=dtype,
        )
        self.secondary = GroupGates(
            width=width,
            num_groups=num_groups,
            group_size=group_size,
            k=k_secondary,
            noise_epsilon=noise_epsilon,
            device=device,
            dtype=dtype,
        )

    def ops_per_token(self) -> int:
        num_groups, group_size = self.primary.num_experts, self.secondary.group_size
        width = self.primary.w_gate.shape[0]
        return 2 * width * (num_groups + self.primary.pairs_per_token * group_size)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        num_groups, group_size = self.primary.num_experts, self.secondary.group_size
        noise_TA = noise_NB = None
        if noise is not None:
            noise_TA, noise_NB = noise[:, :num_groups], noise[:, num_groups:].reshape(-1, group_size)
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T).to(gate_dtype(x_TD, self.primary.w_gate))
            groups = self.primary(x_TD, mask_T, noise_TA)
            plan = plan_rows(groups)
            clean_NB, choice = self.secondary(dispatch(x_TD, plan), plan, noise_NB)
            return self._join(groups, clean_NB, choice)

    def _join(self, groups: Routing, clean_NB: Tensor, choice: Choice) -> Routing:
        """The routing over all experts; a pair of a token and a group is a row here."""
        num_groups, group_size = self.primary.num_experts, self.secondary.group_size
        is_used_N1 = (groups.expert_N < num_groups)[:, None]
        expert_NK = groups.expert_N[:, None] * group_size + choice.expert_TK
        # A pair that reaches no group reaches no expert.
        expert_NK = expert_NK.where(is_used_N1, self.num_experts)
        weight_NK = (groups.weight_N[:, None] * choice.weight_TK).where(is_used_N1, 0.0)
        count_E = count_by_expert(expert_NK, self.num_experts)
        within_load_E = count_E.to(weight_NK.dtype)
        if choice.in_topk_TE is not None:
            within_load_E = self._sum_by_group(choice.in_topk_TE, groups)
        group_z_N1 = clean_NB.logsumexp(dim=-1, keepdim=True)
        sums = BalanceSums(
            importance_E=sum_by_expert(weight_NK, expert_NK, self.num_experts),
            count_E=count_E,
            within_load_E=within_load_E,
            group_load_A=groups.sums.load_E,
            group_count_A=groups.sums.count_E,
            within_probability_E=self._sum_by_group((clean_NB - group_z_N1).exp(), groups),
            group_probability_A=groups.sums.probability_E,
            z=groups.sums.z + group_z_N1.where(is_used_N1, 0.0).square().sum(),
            num_tokens=groups.sums.num_tokens,
        )
        pairs = (-1, self.pairs_per_token)
        return Routing.of_pairs(
            expert_TK=expert_NK.reshape(pairs),
            weight_TK=weight_NK.reshape(pairs),
            num_experts=self.num_experts,
            sums=sums,
        )

    def _sum_by_group(self, value_NB: Tensor, groups: Routing) -> Tensor:
        """Sum the rows of each group: [E], group by group. Unused pairs fall into a bin that is cut off."""
        bins = value_NB.new_zeros(self.primary.num_experts + 1, value_NB.shape[1])
        return bins.index_add(0, groups.expert_N, value_NB)[:-1].flatten()


class GroupGates(nn.Module):
    """The secondary gates G_1 .. G_a of a hierarchy (eq. 12): noisy top-k gating within each group.

    Parameters: w_gate, w_noise [num_groups, width, group_size].
    """

    def __init__(
        self,
        *,
        width: int,
        num_groups: int,
        group_size: int,
        k: int,
        noise_epsilon: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.k = k
        self.noise_epsilon = noise_epsilon
        shape = (num_groups, width, group_size)
        self.w_gate = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.w_noise = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.w_gate)
        nn.init.zeros_(self.w_noise)

    def extra_repr(self) -> str:
        num_groups, width, group_size = self.w_gate.shape
        return f"width={width}, num_groups={num_groups}, group_size={group_size}, k={self.k}"

    def forward(self, rows_ND: Tensor, plan: Plan, noise_NB: Tensor | None) -> tuple[Tensor, Choice]:
        """rows_ND: tokens in the plan's order. noise_NB, and what is returned: in the pairs' order."""
        clean_NB = self._logits(rows_ND, self.w_gate, plan)
        std_NB = None
        if self.training:
            std_NB = F.softplus(self._logits(rows_ND, self.w_noise, plan)) + self.noise_epsilon
            noise_NB = torch.randn_like(clean_NB) if noise_NB is None else noise_NB.to(clean_NB.dtype)
        return clean_NB, choose(clean_NB, std_NB, noise_NB, k=self.k)

    def _logits(self, rows_ND: Tensor, weight_ADB: Tensor, plan: Plan) -> Tensor:
        return in_pair_order(grouped_product(rows_ND, weight_ADB.to(rows_ND.dtype), plan.end_E), plan)


def require_hierarchy(*, num_experts: int, num_groups: int, k_primary: int, k_secondary: int) -> None:
    """Refuse groups that do not divide the experts, and choices that cannot be made."""
    if num_groups < 1 or num_experts < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups ({num_groups}) must divide num_experts ({num_experts})")
    group_size = num_experts // num_groups
    if not 1 <= k_primary <= num_groups:
        raise ValueError(f"k_primary ({k_primary}) must be between 1 and num_groups ({num_groups})")
    if not 1 <= k_secondary <= group_size:
        raise ValueError(
            f"k_secondary ({k_secondary}) must be between 1 and the experts of a group ({group_size})"
        )
