"""MoE: a gate decides, experts compute."""

from math import prod

import torch
from torch import Tensor, nn

from .experts.experts import Experts
from .experts.feed_forward import FeedForward
from .gating.gate import Gate, without_padding
from .gating.noisy_topk import NoisyTopK
from .routing import Routing


class MoE(nn.Module):
    """A sparsely-gated mixture of experts: y = sum over the chosen experts of G(x)_i E_i(x) (eq. 1).

    No token is ever dropped, and experts that a token does not choose are not computed for it.

    gate: decides (`NoisyTopK`, ...). experts: compute (`FeedForward`, `ModuleExperts`, ...).
    shared: a module that every real token passes through as well; its output is added. None: absent.
    check_finite: raise ValueError on a non-finite input among the real tokens. It costs a host
        synchronisation and a graph break; without it a non-finite token spoils its own output and the sums,
        and no other token unless the gate selects over the batch.

    >>> moe = MoE.noisy_topk(width=8, hidden=16, num_experts=4, k=2)
    >>> y, routing = moe(torch.randn(3, 5, 8))
    >>> y.shape, routing.expert_N.shape
    (torch.Size([3, 5, 8]), torch.Size([30]))
    """

    def __init__(
        self, *, gate: Gate, experts: Experts, shared: nn.Module | None = None, check_finite: bool = False
    ) -> None:
        super().__init__()
        if gate.num_experts != experts.num_experts:
            raise ValueError(
                f"gate.num_experts ({gate.num_experts}) must equal "
                f"experts.num_experts ({experts.num_experts})"
            )
        self.gate = gate
        self.experts = experts
        self.shared = shared
        self.check_finite = check_finite

    @staticmethod
    def noisy_topk(
        *,
        width: int,
        hidden: int,
        num_experts: int,
        k: int,
        noise_epsilon: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MoE":
        """The paper's layer: noisy top-k gating (eq. 3 to 5), ReLU experts with one hidden layer, no biases.

        width: of input and output. hidden: of each expert. k: experts per token. noise_epsilon: added to the
        noise's standard deviation (the paper: 0; the authors' published code: 0.01).
        """
        return MoE(
            gate=NoisyTopK(
                width=width,
                num_experts=num_experts,
                k=k,
                noise_epsilon=noise_epsilon,
                device=device,
                dtype=dtype,
            ),
            experts=FeedForward(
                width=width, hidden=hidden, num_experts=num_experts, device=device, dtype=dtype
            ),
        )

    def forward(
        self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Return the mixture's output and the routing that made it.

        x: [..., width]. mask: bool [...], true for real tokens; padding reaches neither experts nor `shared`
        nor statistics, and its output is 0. noise: [..., gate.noise_width], standard normal; drawn where
        absent; not used in evaluation mode. Output: y [..., width] of x's dtype, and the Routing over the
        flattened tokens. ValueError: a mask or noise of another shape, which would broadcast in silence.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = _flatten("mask", mask, x.shape[:-1])
        noise_TE = _flatten("noise", noise, x.shape[:-1], self.gate.noise_width)
        if self.check_finite:
            _require_finite(x_TD, mask_T)
        routing = self.gate(x_TD, mask_T, noise_TE)
        y_TD = self.experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + without_padding(self.shared(without_padding(x_TD, mask_T)), mask_T)
        return y_TD.reshape(x.shape), routing

    def ops_per_token(self) -> int:
        """Multiply-adds per token in the forward pass, gate included: the paper's metric (section 5.1).

        A shared module counts one for each parameter, which holds for stacks of linear layers.
        """
        shared = 0 if self.shared is None else sum(p.numel() for p in self.shared.parameters())
        return self.gate.ops_per_token() + self.gate.pairs_per_token * self.experts.ops_per_pair() + shared


def _flatten(name: str, value: Tensor | None, leading: torch.Size, *trailing: int) -> Tensor | None:
    """Flatten the token axes of what travels with x."""
    if value is None:
        return None
    if value.shape != (*leading, *trailing):
        raise ValueError(f"{name}: its shape {[*value.shape]} must be {[*leading, *trailing]}, to fit x")
    return value.reshape(prod(leading), *trailing)


def _require_finite(x_TD: Tensor, mask_T: Tensor | None) -> None:
    bad_T = ~torch.isfinite(x_TD).all(dim=-1)
    if mask_T is not None:
        bad_T = bad_T & mask_T
    if bad_T.any():
        first = int(bad_T.nonzero()[0])
        raise ValueError(
            f"x: {int(bad_T.sum())} of {x_TD.shape[0]} tokens are not finite (first: token {first}); "
            "look for an overflow in the layer before the mixture"
        )
