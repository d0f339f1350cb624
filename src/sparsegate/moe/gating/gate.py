"""Gate: the interface of everything that decides which tokens go to which experts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..routing import BalanceSums, Routing


class Gate(nn.Module, ABC):
    """Decides: `gate(x_TD, mask_T, noise) -> Routing`.

    num_experts: E. pairs_per_token: K, the number of experts of each real token; where `pairs_vary` in
        training, its mean.
    noise_width: standard normal draws per token that can be given in training; 0 for none.
    """

    num_experts: int
    pairs_per_token: int
    pairs_vary: bool = False
    noise_width: int

    @property
    def selects_over_batch(self) -> bool:
        """Whether, in the present mode, a token's experts depend on the other tokens of the call.

        Then parts of a batch are not routed as the whole would be.
        """
        return False

    @property
    def sees_later_tokens(self) -> bool:
        """Whether, in the present mode, they depend on tokens after it, which a causal model must not."""
        return self.selects_over_batch

    @abstractmethod
    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        """Route tokens. mask_T: bool, true for real tokens. noise: [T, noise_width], standard normal."""

    @abstractmethod
    def ops_per_token(self) -> int:
        """Multiply-adds per token in the forward pass."""

    def after_step(self, sums: BalanceSums) -> None:
        """Called after each optimizer step with the sums of the whole batch; does nothing in most gates."""


def gate_dtype(x_TD: Tensor, weight_DE: Tensor) -> torch.dtype:
    """Gates compute in float32 at least, whatever the model's precision; float64 stays float64."""
    return torch.promote_types(torch.promote_types(x_TD.dtype, weight_DE.dtype), torch.float32)


def without_padding(x_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    """Zeros in place of padding: whatever stands there, even NaN, reaches neither sums nor gradients."""
    return x_TD if mask_T is None else x_TD.masked_fill(~mask_T[:, None], 0.0)


def require_experts(*, num_experts: int, k: int) -> None:
    """Refuse a choice of k experts that cannot be made."""
    if num_experts < 1:
        raise ValueError(f"num_experts ({num_experts}) must be at least 1")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k ({k}) must be between 1 and num_experts ({num_experts})")
