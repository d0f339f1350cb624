"""Hierarchical gating (appendix B of the paper): a gate over groups, and a gate in each group."""

from dataclasses import replace

import torch
from torch import Tensor

from ..dispatch import dispatch, plan_rows
from ..precision import autocast_off
from ..routing import BalanceSums, Routing, count, count_routed, sum_by
from .gate import Gate, gate_dtype, without_padding
from .group_gates import ChoiceInGroups, GroupGates, NoisyTopKGroups
from .noisy_topk import NoisyTopK


class Hierarchical(Gate):
    """G(x)_ij = G_primary(x)_i G_i(x)_j over num_groups groups of equally many experts (eq. 12).

    Only the chosen groups' gates are computed, by one grouped product over all of them; memory grows with
    T * (groups + k_primary * (width + experts of a group)), never with T * E. Expert j of group i is expert
    i * group_size + j of the routing. Importance and load are those of eq. 13 and 14, over all experts
    together. Where the primary gate gives the weight 1, as noisy top-k gating does with k = 1, only the
    balance losses train it.

    primary: a gate over the groups, such as `NoisyTopK` or `Balanced`. secondary: the gates in the groups,
    `NoisyTopKGroups` or `BalancedGroups`. Noise is [T, that of the primary gate, then that of each chosen
    group, the best one first]; where the number of groups of a token varies, the secondary gates draw their
    own and none can be given.

    >>> gate = Hierarchical.noisy_topk(width=8, num_experts=12, num_groups=4, k_primary=2, k_secondary=1)
    >>> gate(torch.randn(5, 8)).expert_N.shape
    torch.Size([10])
    """

    def __init__(self, *, primary: Gate, secondary: GroupGates) -> None:
        super().__init__()
        if primary.num_experts != secondary.num_groups:
            raise ValueError(
                f"primary.num_experts ({primary.num_experts}) must equal "
                f"secondary.num_groups ({secondary.num_groups})"
            )
        self.primary = primary
        self.secondary = secondary
        self.num_experts = secondary.num_groups * secondary.group_size
        self.pairs_per_token = primary.pairs_per_token * secondary.pairs_per_row
        self.pairs_vary = primary.pairs_vary or secondary.pairs_vary
        self.noise_width = primary.noise_width
        if not primary.pairs_vary:
            self.noise_width += primary.pairs_per_token * secondary.noise_width

    @staticmethod
    def noisy_topk(
        *,
        width: int,
        num_experts: int,
        num_groups: int,
        k_primary: int,
        k_secondary: int,
        noise_epsilon: float = 0.0,
        kernel: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Hierarchical":
        """The paper's hierarchy: noisy top-k gating at both levels, all weights zero at the start.

        k_primary: groups per token. k_secondary: experts per token in each of these groups. noise_epsilon:
        added to the noise's standard deviation at both levels. kernel: of the groups' products; None: "loop",
        which on a GPU makes one after the other, where the host waits for the counts; "triton" waits for
        nothing, chooses groups in one pass, and has not run on a device yet.
        """
        require_hierarchy(
            num_experts=num_experts, num_groups=num_groups, k_primary=k_primary, k_secondary=k_secondary
        )
        return Hierarchical(
            primary=NoisyTopK(
                width=width,
                num_experts=num_groups,
                k=k_primary,
                noise_epsilon=noise_epsilon,
                kernel="triton" if kernel == "triton" else None,
                device=device,
                dtype=dtype,
            ),
            secondary=NoisyTopKGroups(
                width=width,
                num_groups=num_groups,
                group_size=num_experts // num_groups,
                k=k_secondary,
                noise_epsilon=noise_epsilon,
                kernel=kernel,
                device=device,
                dtype=dtype,
            ),
        )

    @property
    def selects_over_batch(self) -> bool:
        return self.primary.selects_over_batch or self.secondary.selects_over_batch

    @property
    def sees_later_tokens(self) -> bool:
        return self.primary.sees_later_tokens or self.secondary.selects_over_batch

    def after_step(self, sums: BalanceSums) -> None:
        """The primary gate's experts are the groups."""
        self.primary.after_step(replace(sums, count_E=sums.group_count_A))

    def ops_per_token(self) -> int:
        return self.primary.ops_per_token() + self.primary.pairs_per_token * self.secondary.ops_per_row()

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        primary_noise, noise_NB = self._split(noise)
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T)
            x_TD = x_TD.to(gate_dtype(x_TD, self.secondary.w_gate))
            groups = self.primary(x_TD, mask_T, primary_noise)
            plan = plan_rows(groups)
            choice = self.secondary(dispatch(x_TD, plan), groups, plan, noise_NB)
            return self._join(groups, choice)

    def _split(self, noise: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The noise of the primary gate, and of each row of the secondary ones."""
        if noise is None:
            return None, None
        if not self.noise_width:
            raise ValueError("noise: this hierarchy takes none; pass None")
        width = self.primary.noise_width
        primary_noise = noise[:, :width] if width else None
        if width == self.noise_width:
            return primary_noise, None
        return primary_noise, noise[:, width:].reshape(-1, self.secondary.noise_width)

    def _join(self, groups: Routing, choice: ChoiceInGroups) -> Routing:
        """The routing over all experts; a pair of a token and a group is a row here."""
        num_groups, group_size = self.secondary.num_groups, self.secondary.group_size
        num_tokens = groups.pairs_T.shape[0]
        group_P, token_P = groups.expert_N[choice.row_P], groups.token_N[choice.row_P]
        # A pair that reaches no group reaches no expert.
        is_used_P = (group_P < num_groups) & (choice.expert_P < group_size)
        expert_P = (group_P * group_size + choice.expert_P).where(is_used_P, self.num_experts)
        weight_P = (_of_rows(groups.weight_N, choice) * choice.weight_P).where(is_used_P, 0.0)
        pairs_T, pairs_per_token = count(token_P, num_tokens), None
        if groups.pairs_per_token is not None and choice.pairs_per_row is not None:
            pairs_per_token = groups.pairs_per_token * choice.pairs_per_row
        return Routing(
            token_N=token_P,
            expert_N=expert_P,
            weight_N=weight_P,
            pairs_T=pairs_T,
            sums=self._sums(groups, choice, token_P, expert_P, weight_P),
            num_experts=self.num_experts,
            pairs_per_token=pairs_per_token,
        )

    def _sums(
        self, groups: Routing, choice: ChoiceInGroups, token_P: Tensor, expert_P: Tensor, weight_P: Tensor
    ) -> BalanceSums:
        """Eq. 13, and the factors of eq. 14."""
        count_E = count(expert_P, self.num_experts)
        within_load_E = count_E.to(weight_P.dtype)
        if choice.load_AB is not None:
            within_load_E = choice.load_AB.flatten()
        num_routed = count_routed(token_P, expert_P < self.num_experts, groups.pairs_T.shape[0])
        return BalanceSums(
            importance_E=sum_by(weight_P, expert_P, self.num_experts),
            count_E=count_E,
            within_load_E=within_load_E,
            group_load_A=groups.sums.load_E,
            group_count_A=count(groups.expert_N, self.secondary.num_groups),
            within_probability_E=choice.logit_sums.probability_AE.flatten(),
            group_probability_A=groups.sums.probability_E,
            z=groups.sums.z + choice.logit_sums.z,
            threshold=groups.sums.threshold + choice.threshold,
            num_tokens=groups.sums.num_tokens,
            num_unrouted=groups.sums.num_tokens - num_routed,
            num_dropped=groups.sums.num_dropped * self.secondary.pairs_per_row,
        )


def _of_rows(value_N: Tensor, choice: ChoiceInGroups) -> Tensor:
    """The value of each pair's row; where rows have equally many pairs without an index, whose gradient would
    be summed in random order on a GPU."""
    if choice.pairs_per_row is None:
        return value_N[choice.row_P]
    return value_N[:, None].expand(-1, choice.pairs_per_row).flatten()


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
