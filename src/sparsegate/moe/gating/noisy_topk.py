"""Noisy top-k gating (section 2.1 and appendix A of the paper)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.choice import noisy_choice_kernel
from ..kernels.noisy_choice import Choice
from ..precision import autocast_off
from ..routing import Routing, only_group, sums_of_logits
from .gate import Gate, gate_dtype, require_experts, without_padding


class NoisyTopK(Gate):
    """G(x) = Softmax(KeepTopK(H(x), k)), H(x) = x W_gate + StandardNormal * Softplus(x W_noise) (eq. 3 to 5).

    Both weights start at zero: no signal and some noise, so that training starts with balanced experts. Noise
    is used in training mode only. With k = 1 the one weight is always 1 and the task gives the gate no
    gradient; only the balance losses train it.

    width: of the input. k: experts per token. noise_epsilon: added to the noise's standard deviation (the
    paper: 0; the authors' published code: 0.01). kernel: of the choice in training; None: "threaded" on the
    CPU, elsewhere "equations"; "triton" does it in one pass on a GPU, and has not run on a device yet. Where
    every expert is chosen there is none.
    """

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        noise_epsilon: float = 0.0,
        kernel: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_experts(num_experts=num_experts, k=k)
        require_epsilon(noise_epsilon)
        self.num_experts = self.noise_width = num_experts
        self.pairs_per_token = k
        self.noise_epsilon = noise_epsilon
        self.kernel = kernel
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
            if self.training:
                logits_TS = x_TD @ torch.cat([self.w_gate, self.w_noise], dim=1).to(x_TD.dtype)
                if noise is None:
                    noise = torch.randn_like(logits_TS[:, : self.num_experts])
                choice = choose_by_noisy_logits(
                    logits_TS,
                    noise.to(x_TD.dtype),
                    only_group(mask_T),
                    num_groups=1,
                    k=self.pairs_per_token,
                    noise_epsilon=self.noise_epsilon,
                    kernel=self.kernel,
                )
            else:
                logits_TE = x_TD @ self.w_gate.to(x_TD.dtype)
                choice = choose(logits_TE, only_group(mask_T), num_groups=1, k=self.pairs_per_token)
            return Routing.of_token_choice(
                expert_TK=choice.expert_NK,
                weight_TK=choice.weight_NK,
                mask_T=mask_T,
                logit_sums=choice.logit_sums,
                load_E=None if choice.load_AB is None else choice.load_AB.squeeze(0),
            )


def choose_by_noisy_logits(
    logits_NS: Tensor,
    noise_NB: Tensor,
    group_N: Tensor | None,
    *,
    num_groups: int,
    k: int,
    noise_epsilon: float,
    kernel: str | None = None,
) -> Choice:
    """Eq. 3 to 5, and 8 to 10: the arguments are those of `noisy_choice.equations`, but k may be B as well.

    group_N ascends where there are several groups. kernel: as of `noisy_choice_kernel`; "triton" takes one
    group.
    """
    if k < noise_NB.shape[1]:
        compute = noisy_choice_kernel(kernel, noise_NB.device.type, noise_NB.dtype, noise_NB.shape[1])
        return compute(logits_NS, noise_NB, group_N, num_groups=num_groups, k=k, noise_epsilon=noise_epsilon)
    clean_NB, raw_std_NB = logits_NS.chunk(2, dim=1)
    noisy_NB = clean_NB + noise_NB * (F.softplus(raw_std_NB) + noise_epsilon)
    choice = choose(noisy_NB, group_N, num_groups=num_groups, k=k)
    return choice._replace(logit_sums=sums_of_logits(clean_NB, group_N, num_groups=num_groups))


def choose(logit_NB: Tensor, group_N: Tensor | None, *, num_groups: int, k: int) -> Choice:
    """Eq. 3 and 5 without noise: the k best of each row, and a softmax over them."""
    top_NK, expert_NK = logit_NB.topk(k, dim=-1)
    logit_sums = sums_of_logits(logit_NB, group_N, num_groups=num_groups)
    return Choice(expert_NK, top_NK.softmax(dim=-1), logit_sums, None)


def require_epsilon(noise_epsilon: float) -> None:
    """Refuse a deviation that would take noise away."""
    if not noise_epsilon >= 0:
        raise ValueError(f"noise_epsilon ({noise_epsilon}) must not be negative")
