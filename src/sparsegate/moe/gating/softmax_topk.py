"""Top-k gating without noise: eq. 3 and 5 alone, and the gates of Switch and of the mixtures after it."""

import torch
from torch import Tensor, nn

from ..precision import autocast_off
from ..routing import Routing, only_group, sums_of_logits
from .gate import Gate, gate_dtype, require_experts, without_padding


class SoftmaxTopK(Gate):
    """The k experts with the largest x W_gate, in every mode without noise.

    renormalize: true: G(x) = Softmax(KeepTopK(x W_gate, k)), eq. 3 and 5, the weights of a token sum to 1;
        with k = 1 the one weight is always 1, and neither the task nor `importance_loss` trains the gate.
        False: a chosen expert keeps its probability among all experts, so that weights sum to at most 1 and
        the task trains the gate for any k; with k = 1 this is the gate of Switch (Fedus et al. 2021, eq. 1
        and 2).
    jitter: in training the gate, and it alone, sees each input component multiplied by a uniform draw from
        1 - jitter to 1 + jitter (Switch: 0.01). The draws come from the given noise through the normal
        distribution function.

    Without noise nothing but the weights decides, and equal weights would send every token to the same
    experts: w_gate starts normal with variance 0.1/width (Switch, section 2.4). Train it with `switch_loss`,
    or where weights vary with `importance_loss`; the load has no smooth estimate here.

    width: of the input. k: experts per token.
    """

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        renormalize: bool = True,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_experts(num_experts=num_experts, k=k)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter ({jitter}) must be at least 0 and below 1")
        self.num_experts = num_experts
        self.pairs_per_token = k
        self.renormalize = renormalize
        self.jitter = jitter
        self.noise_width = width if jitter else 0
        self.w_gate = nn.Parameter(torch.empty(width, num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gate, std=(0.1 / self.w_gate.shape[0]) ** 0.5)

    def extra_repr(self) -> str:
        width, num_experts = self.w_gate.shape
        return (
            f"width={width}, num_experts={num_experts}, k={self.pairs_per_token}, "
            f"renormalize={self.renormalize}, jitter={self.jitter}"
        )

    def ops_per_token(self) -> int:
        return self.w_gate.numel()

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        if noise is not None and not self.jitter:
            raise ValueError("noise: a softmax top-k gate without jitter uses none; pass None")
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T).to(gate_dtype(x_TD, self.w_gate))
            if self.training and self.jitter:
                noise_TD = torch.randn_like(x_TD) if noise is None else noise.to(x_TD.dtype)
                x_TD = x_TD * (1 + self.jitter * (2 * torch.special.ndtr(noise_TD) - 1))
            logit_TE = x_TD @ self.w_gate.to(x_TD.dtype)
            top_TK, expert_TK = logit_TE.topk(self.pairs_per_token, dim=-1)
            if self.renormalize:
                weight_TK = top_TK.softmax(dim=-1)
            else:
                weight_TK = (top_TK - logit_TE.logsumexp(dim=-1, keepdim=True)).exp()
            return Routing.of_token_choice(
                logit_sums=sums_of_logits(logit_TE, only_group(mask_T)),
                expert_TK=expert_TK,
                weight_TK=weight_TK,
                mask_T=mask_T,
                load_E=None,
            )
