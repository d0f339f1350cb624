"""Noisy top-k gating (section 2.1 and appendix A of the paper)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import autocast_off
from ..routing import Routing
from .gate import Gate, gate_dtype, require_experts, without_padding

# Where softplus underflows, the quotient of eq. 9 and its gradient must stay finite: P is then 0 or 1.
_SMALLEST_STD = 1e-12


class NoisyTopK(Gate):
    """G(x) = Softmax(KeepTopK(H(x), k)), H(x) = x W_gate + StandardNormal * Softplus(x W_noise) (eq. 3 to 5).

    Both weights start at zero: no signal and some noise, so that training starts with balanced experts. Noise
    is used in training mode only. With k = 1 the one weight is always 1 and the task gives the gate no
    gradient; only the balance losses train it.

    width: of the input. k: experts per token. noise_epsilon: added to the noise's standard deviation (the
    paper: 0; the authors' published code: 0.01).
    """

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        noise_epsilon: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_experts(num_experts=num_experts, k=k)
        require_epsilon(noise_epsilon)
        self.num_experts = self.noise_width = num_experts
        self.pairs_per_token = k
        self.noise_epsilon = noise_epsilon
        self.w_gate = nn.Parameter(torch.empty(width, num_experts, device=device, dtype=dtype))
        self.w_noise = nn.Parameter(torch.empty(width, num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.w_gate)
        nn.init.zeros_(self.w_noise)

    def extra_repr(self) -> str:
        width, num_experts = self.w_gate.shape
        return f"width={width}, num_experts={num_experts}, k={self.pairs_per_token}"

    def ops_per_token(self) -> int:
        return 2 * self.w_gate.numel()

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T).to(gate_dtype(x_TD, self.w_gate))
            clean_TE = x_TD @ self.w_gate.to(x_TD.dtype)
            std_TE = noise_TE = None
            if self.training:
                std_TE = F.softplus(x_TD @ self.w_noise.to(x_TD.dtype)) + self.noise_epsilon
                noise_TE = torch.randn_like(clean_TE) if noise is None else noise.to(x_TD.dtype)
            choice = choose(clean_TE, std_TE, noise_TE, k=self.pairs_per_token)
            load_E = None
            if choice.in_topk_TE is not None:
                p_TE = choice.in_topk_TE
                load_E = (p_TE if mask_T is None else p_TE.masked_fill(~mask_T[:, None], 0.0)).sum(dim=0)
            return Routing.of_token_choice(
                logit_TE=clean_TE,
                expert_TK=choice.expert_TK,
                weight_TK=choice.weight_TK,
                mask_T=mask_T,
                load_E=load_E,
            )


class Choice(NamedTuple):
    """Of each token (or each pair of token and group): its k experts, their weights, and P(x, i) of eq. 8.

    in_topk_TE: None without noise, and where every expert is chosen.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    in_topk_TE: Tensor | None


def choose(clean_TE: Tensor, std_TE: Tensor | None, noise_TE: Tensor | None, *, k: int) -> Choice:
    """Eq. 3 to 5, 8 and 9 from logits, the noise's standard deviation and its draws; None: no noise."""
    num_experts = clean_TE.shape[1]
    noisy_TE = clean_TE if std_TE is None or noise_TE is None else clean_TE + noise_TE * std_TE
    # One value more than is kept: the load estimate needs the best value that is left out.
    top_TK1, expert_TK1 = noisy_TE.topk(min(k + 1, num_experts), dim=-1)
    expert_TK = expert_TK1[:, :k]
    in_topk_TE = None
    if std_TE is not None and k < num_experts:
        in_topk_TE = probability_in_topk(clean_TE, std_TE, top_TK1, expert_TK)
    return Choice(expert_TK, top_TK1[:, :k].softmax(dim=-1), in_topk_TE)


def probability_in_topk(clean_TE: Tensor, std_TE: Tensor, top_TK1: Tensor, chosen_TK: Tensor) -> Tensor:
    """P(x, i) of eq. 8 and 9: the probability that expert i is among the k best if only its noise is redrawn.

    clean_TE: logits without noise. std_TE: standard deviation of the noise. top_TK1: the k + 1 largest noisy
    logits in descending order. chosen_TK: the experts of the first k. Returns [T, E].

    The threshold is the k-th largest noisy logit among the *other* experts: the (k+1)-th of all for a chosen
    expert, the k-th for the rest. Membership goes by index, since comparing values would miscount ties.
    """
    best_left_out_T1, worst_kept_T1 = top_TK1[:, -1:], top_TK1[:, -2:-1]
    chosen_TE = torch.zeros_like(clean_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    threshold_TE = torch.where(chosen_TE, best_left_out_T1, worst_kept_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE.clamp_min(_SMALLEST_STD))


def require_epsilon(noise_epsilon: float) -> None:
    """Refuse a deviation that would take noise away."""
    if not noise_epsilon >= 0:
        raise ValueError(f"noise_epsilon ({noise_epsilon}) must not be negative")
