"""The secondary gates of a hierarchy (eq. 12): in each group a gate over its experts, all at once."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import Plan, in_pair_order
from ..kernels.choice import grouped_kernel
from ..kernels.grouped import grouped_product, grouped_products
from ..routing import LogitSums, Routing, entries, pick, sums_of_logits, tokens_of_rows
from .balanced import (
    above_threshold,
    masked_softmax,
    require_most_per_token,
    require_trained,
    threshold_terms,
)
from .batchwise import batchwise, blocks, num_blocks, require_scope, smaller
from .noisy_topk import choose, choose_by_noisy_logits, require_epsilon


class ChoiceInGroups(NamedTuple):
    """What the secondary gates decide of N rows, the pairs of a token and a group, as P entries, row by row.

    row_P: int64, ascending. expert_P: int64, the expert's place in its group; the size of the group for none.
    weight_P: G_i(x)_j. pairs_per_row: P / N where it is fixed, else None. logit_sums: of each group.
    load_AB: sum of P(x, i) of eq. 8; None where the counts stand for it. threshold: the summand of eq. 20,
    float scalar.
    """

    row_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    pairs_per_row: int | None
    logit_sums: LogitSums
    load_AB: Tensor | None
    threshold: Tensor


class GroupGates(nn.Module, ABC):
    """Gates G_1 .. G_a of a hierarchy: `(rows, groups, plan, noise) -> ChoiceInGroups`.

    num_groups: a. group_size: experts of each group. pairs_per_row: experts per token and group; where
    `pairs_vary` in training, their mean. noise_width: standard normal draws per row that can be given in
    training; 0 for none. kernel: of the products with the groups' matrices, as `choice.grouped_kernel` takes
    it. w_gate: [num_groups, width, group_size].
    """

    num_groups: int
    group_size: int
    pairs_per_row: int
    pairs_vary: bool = False
    noise_width: int
    kernel: str | None = None
    w_gate: nn.Parameter

    @property
    def selects_over_batch(self) -> bool:
        """As of a `Gate`."""
        return False

    @abstractmethod
    def forward(
        self, rows_ND: Tensor, groups: Routing, plan: Plan, noise_NB: Tensor | None
    ) -> ChoiceInGroups:
        """rows_ND: tokens in the plan's order. noise_NB, and what is returned: in the order of the pairs."""

    @abstractmethod
    def ops_per_row(self) -> int:
        """Multiply-adds per pair of a token and a group in the forward pass."""

    def logits(self, rows_ND: Tensor, plan: Plan) -> Tensor:
        """x W_gate of each row's group: [N, group_size]."""
        return grouped_product(
            rows_ND, self.w_gate.to(rows_ND.dtype), plan.end_E, kernel=self.kernel_for(rows_ND)
        )

    def kernel_for(self, rows_ND: Tensor) -> str:
        """ValueError: the one that was named does not suit these rows."""
        return grouped_kernel(self.kernel, rows_ND.device.type, rows_ND.dtype, *self.w_gate.shape)


class NoisyTopKGroups(GroupGates):
    """Noisy top-k gating within each group.

    Parameters: w_gate, w_noise [num_groups, width, group_size], which start at zero.
    """

    def __init__(
        self,
        *,
        width: int,
        num_groups: int,
        group_size: int,
        k: int,
        noise_epsilon: float = 0.0,
        kernel: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_groups(num_groups=num_groups, group_size=group_size, k=k)
        require_epsilon(noise_epsilon)
        self.num_groups = num_groups
        self.group_size = self.noise_width = group_size
        self.pairs_per_row = k
        self.noise_epsilon = noise_epsilon
        self.kernel = kernel
        shape = (num_groups, width, group_size)
        self.w_gate = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.w_noise = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.w_gate)
        nn.init.zeros_(self.w_noise)

    def extra_repr(self) -> str:
        num_groups, width, group_size = self.w_gate.shape
        return f"width={width}, num_groups={num_groups}, group_size={group_size}, k={self.pairs_per_row}"

    def ops_per_row(self) -> int:
        return 2 * self.w_gate[0].numel()

    def forward(
        self, rows_ND: Tensor, groups: Routing, plan: Plan, noise_NB: Tensor | None
    ) -> ChoiceInGroups:
        # In the order of the rows, where those of a group stand together; only what is chosen is put back.
        group_N = groups.expert_N[plan.order_N]
        if self.training:
            w_gate, w_noise = (weight.to(rows_ND.dtype) for weight in (self.w_gate, self.w_noise))
            logits_NS = grouped_products(
                rows_ND, w_gate, w_noise, plan.end_E, kernel=self.kernel_for(rows_ND)
            )
            if noise_NB is None:
                noise_NB = torch.randn_like(logits_NS[:, : self.group_size])
            else:
                noise_NB = noise_NB.to(rows_ND.dtype).index_select(0, plan.order_N)
            choice = choose_by_noisy_logits(
                logits_NS,
                noise_NB,
                group_N,
                num_groups=self.num_groups,
                k=self.pairs_per_row,
                noise_epsilon=self.noise_epsilon,
            )
        else:
            logit_NB = self.logits(rows_ND, plan)
            choice = choose(logit_NB, group_N, num_groups=self.num_groups, k=self.pairs_per_row)
        expert_NK = choice.expert_NK.index_select(0, plan.row_N)
        return ChoiceInGroups(
            row_P=tokens_of_rows(expert_NK),
            expert_P=expert_NK.flatten(),
            weight_P=in_pair_order(choice.weight_NK, plan).flatten(),
            pairs_per_row=self.pairs_per_row,
            logit_sums=choice.logit_sums,
            load_AB=choice.load_AB,
            threshold=choice.weight_NK.new_zeros(()),
        )


class BalancedGroups(GroupGates):
    """Strictly balanced gating within each group: `Balanced` over the tokens that reached the group.

    Of the c tokens of a group each of its experts takes k c / group_size. scope, most_per_token: as there,
    the latter within a group. Parameters: w_gate [num_groups, width, group_size], log_threshold
    [num_groups, group_size].
    """

    noise_width = 0
    pairs_vary = True

    def __init__(
        self,
        *,
        width: int,
        num_groups: int,
        group_size: int,
        k: int,
        scope: int | None = None,
        most_per_token: int | None = None,
        kernel: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_groups(num_groups=num_groups, group_size=group_size, k=k)
        require_scope(scope)
        self.most_per_token = require_most_per_token(most_per_token, group_size)
        self.num_groups = num_groups
        self.group_size = group_size
        self.pairs_per_row = k
        self.scope = scope
        self.kernel = kernel
        self.w_gate = nn.Parameter(torch.empty(num_groups, width, group_size, device=device, dtype=dtype))
        self.log_threshold = nn.Parameter(torch.empty(num_groups, group_size, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def selects_over_batch(self) -> bool:
        return self.training

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gate, std=(0.1 / self.w_gate.shape[1]) ** 0.5)
        nn.init.constant_(self.log_threshold, -math.log(self.group_size))

    def extra_repr(self) -> str:
        num_groups, width, group_size = self.w_gate.shape
        return f"width={width}, num_groups={num_groups}, group_size={group_size}, k={self.pairs_per_row}"

    def ops_per_row(self) -> int:
        return self.w_gate[0].numel()

    def forward(
        self, rows_ND: Tensor, groups: Routing, plan: Plan, noise_NB: Tensor | None
    ) -> ChoiceInGroups:
        logit_NB = in_pair_order(self.logits(rows_ND, plan), plan)
        logit_sums = sums_of_logits(logit_NB, groups.expert_N, num_groups=self.num_groups)
        # Of unused pairs any group's thresholds do: they reach no expert.
        group_N = groups.expert_N.clamp_max(self.num_groups - 1)
        log_threshold_NB = self.log_threshold.to(logit_NB.dtype)[group_N]
        if not self.training:
            require_trained(self.log_threshold, num_experts=self.group_size)
            expert_NK, weight_NK = above_threshold(
                logit_NB, log_threshold_NB, most_per_token=self.most_per_token
            )
            return ChoiceInGroups(
                row_P=tokens_of_rows(expert_NK),
                expert_P=expert_NK.flatten(),
                weight_P=weight_NK.flatten(),
                pairs_per_row=self.most_per_token,
                logit_sums=logit_sums,
                load_AB=None,
                threshold=logit_NB.new_zeros(()),
            )
        segment_N, num_segments = self._segments(groups)
        probability_NB = logit_NB.softmax(dim=-1)
        chosen_NB = batchwise(probability_NB, segment_N, num_segments=num_segments, k=self.pairs_per_row)
        num_rows = logit_NB.shape[0]
        # Each expert's k c / size, rounded up by less than one.
        num_pairs = smaller(
            num_rows * self.group_size, num_rows * self.pairs_per_row + num_segments * self.group_size
        )
        row_P, expert_P = entries(chosen_NB, num_pairs=num_pairs)
        loss_N = threshold_terms(probability_NB, chosen_NB, log_threshold_NB).sum(dim=1)
        return ChoiceInGroups(
            row_P=row_P,
            expert_P=expert_P,
            weight_P=pick(masked_softmax(logit_NB, chosen_NB), row_P, expert_P),
            pairs_per_row=None,
            logit_sums=logit_sums,
            load_AB=None,
            threshold=loss_N.where(groups.expert_N < self.num_groups, 0.0).sum(),
        )

    def _segments(self, groups: Routing) -> tuple[Tensor, int]:
        """Which rows compete: those of one group, and of one block of tokens."""
        num_tokens = groups.pairs_T.shape[0]
        num_segments = num_blocks(num_tokens, self.scope) * self.num_groups
        block_T = blocks(num_tokens, self.scope, None, groups.token_N.device)
        segment_N = block_T[groups.token_N] * self.num_groups + groups.expert_N
        return segment_N.where(groups.expert_N < self.num_groups, num_segments), num_segments


def require_groups(*, num_groups: int, group_size: int, k: int) -> None:
    """Refuse groups that are none, and choices that cannot be made in them."""
    if num_groups < 1 or group_size < 1:
        raise ValueError(f"num_groups ({num_groups}) and group_size ({group_size}) must be at least 1")
    if not 1 <= k <= group_size:
        raise ValueError(f"k ({k}) must be between 1 and the experts of a group, group_size ({group_size})")
