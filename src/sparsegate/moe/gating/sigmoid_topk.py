"""Sigmoid scores, and a bias that balances without a loss (Wang et al. 2024; DeepSeek-V3)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import autocast_off
from ..routing import BalanceSums, Routing, only_group, sums_of_logits
from .gate import Gate, gate_dtype, require_experts, without_padding


class SigmoidTopK(Gate):
    """The k experts with the largest s_i + b_i, s = sigmoid(x W_gate); weights are the s_i of these, over
    their sum, times `scale`.

    The bias b takes part in the choice alone. It has no gradient: after each optimizer step `after_step`
    moves it by `bias_rate` towards the experts that received less than the mean. Call it with the sums of the
    whole batch, `gate.after_step(routing.sums)`; the training loop of this package does. With `bias_rate` 0
    it is a plain gate of sigmoid scores.

    Its probabilities, for `switch_loss`, are the scores over their sum, and z is the logarithm of that sum.

    width: of the input. k: experts per token. scale: factor of all weights (DeepSeek-V3: 2.5). w_gate starts
    normal with variance 0.1/width. Buffer: bias [E], float32 whatever the layer is converted to: in half
    precision its small steps would be lost.
    """

    noise_width = 0
    bias: Tensor

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        bias_rate: float = 1e-3,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_experts(num_experts=num_experts, k=k)
        if not bias_rate >= 0:
            raise ValueError(f"bias_rate ({bias_rate}) must not be negative")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale ({scale}) must be above 0 and finite")
        self.num_experts = num_experts
        self.pairs_per_token = k
        self.bias_rate = bias_rate
        self.scale = scale
        self.w_gate = nn.Parameter(torch.empty(width, num_experts, device=device, dtype=dtype))
        self.register_buffer("bias", torch.empty(num_experts, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gate, std=(0.1 / self.w_gate.shape[0]) ** 0.5)
        nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmoidTopK":
        super()._apply(fn, recurse)
        self.bias = self.bias.float()
        return self

    def extra_repr(self) -> str:
        width, num_experts = self.w_gate.shape
        return (
            f"width={width}, num_experts={num_experts}, k={self.pairs_per_token}, "
            f"bias_rate={self.bias_rate}, scale={self.scale}"
        )

    def ops_per_token(self) -> int:
        return self.w_gate.numel()

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        if noise is not None:
            raise ValueError("noise: a sigmoid gate uses none; pass None")
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T).to(gate_dtype(x_TD, self.w_gate))
            log_score_TE = F.logsigmoid(x_TD @ self.w_gate.to(x_TD.dtype))
            biased_TE = log_score_TE.detach().exp() + self.bias
            expert_TK = biased_TE.topk(self.pairs_per_token, dim=-1).indices
            # The softmax of logarithms is the quotient by the sum, and stays finite where scores vanish.
            weight_TK = log_score_TE.gather(1, expert_TK).softmax(dim=-1) * self.scale
            return Routing.of_token_choice(
                logit_sums=sums_of_logits(log_score_TE, only_group(mask_T)),
                expert_TK=expert_TK,
                weight_TK=weight_TK,
                mask_T=mask_T,
                load_E=None,
            )

    @torch.no_grad()
    def after_step(self, sums: BalanceSums) -> None:
        """b_i += bias_rate * sign(mean count - count_i)."""
        count_E = sums.count_E.to(self.bias.device, torch.float64)
        self.bias += self.bias_rate * (count_E.mean() - count_E).sign().to(self.bias.dtype)
