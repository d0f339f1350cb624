"""Softmax gating over all experts (eq. 2): the dense gate that the sparse ones are compared with."""

import torch
from torch import Tensor, nn

from ..precision import autocast_off
from ..routing import Routing, only_group, sums_of_logits
from .gate import Gate, gate_dtype, require_experts, without_padding


class Softmax(Gate):
    """G(x) = Softmax(x W_gate): every token goes to every expert, in every mode without noise (eq. 2).

    width: of the input. The weight starts at zero, so that all experts start with equal weights.
    """

    noise_width = 0

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_experts(num_experts=num_experts, k=num_experts)
        self.num_experts = self.pairs_per_token = num_experts
        self.w_gate = nn.Parameter(torch.empty(width, num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.w_gate)

    def extra_repr(self) -> str:
        width, num_experts = self.w_gate.shape
        return f"width={width}, num_experts={num_experts}"

    def ops_per_token(self) -> int:
        return self.w_gate.numel()

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        if noise is not None:
            raise ValueError("noise: softmax gating uses none; pass None")
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T).to(gate_dtype(x_TD, self.w_gate))
            logit_TE = x_TD @ self.w_gate.to(x_TD.dtype)
            expert_E = torch.arange(self.num_experts, device=x_TD.device)
            return Routing.of_token_choice(
                logit_sums=sums_of_logits(logit_TE, only_group(mask_T)),
                expert_TK=expert_E.expand(x_TD.shape[0], -1),
                weight_TK=logit_TE.softmax(dim=-1),
                mask_T=mask_T,
                load_E=None,
            )
