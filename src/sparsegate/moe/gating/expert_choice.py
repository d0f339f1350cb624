"""Expert choice (Zhou et al. 2022): every expert takes the tokens that suit it best, equally many."""

import torch
from torch import Tensor, nn

from ..precision import autocast_off
from ..routing import Routing, only_group, sums_of_logits
from .batchwise import batchwise, blocks, most_pairs, num_blocks, require_scope
from .gate import Gate, gate_dtype, require_experts, without_padding


class ExpertChoice(Gate):
    """Each expert takes its k T / E best tokens, in training and in evaluation; a token has k on average.

    The weight of a pair is the token's probability of the expert, Softmax(x W_gate), and is not
    renormalised. A token that no expert takes has the output 0 (`num_unrouted` counts them). Perfect balance
    needs no loss. This is the mask of eq. 18 without the thresholds that make `Balanced` usable in inference.

    Not for autoregressive models: whether a token is taken depends on the tokens after it, which leaks the
    future in training and makes perplexities too good; and one token at a time is another choice than all at
    once. `scope` bounds which tokens compete, and so which know of each other; it cures neither.

    width: of the input. k: experts per token on average. scope: number of consecutive tokens that compete
    with each other, such as the length of a sequence; None: all tokens of a call, and with micro-batches or
    ranks each part's by itself. w_gate starts normal with variance 0.1/width: equal scores would give every
    expert the same tokens.
    """

    noise_width = 0
    pairs_vary = True

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        k: int,
        scope: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_experts(num_experts=num_experts, k=k)
        require_scope(scope)
        self.num_experts = num_experts
        self.pairs_per_token = k
        self.scope = scope
        self.w_gate = nn.Parameter(torch.empty(width, num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def selects_over_batch(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gate, std=(0.1 / self.w_gate.shape[0]) ** 0.5)

    def extra_repr(self) -> str:
        width, num_experts = self.w_gate.shape
        return f"width={width}, num_experts={num_experts}, k={self.pairs_per_token}, scope={self.scope}"

    def ops_per_token(self) -> int:
        return self.w_gate.numel()

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        if noise is not None:
            raise ValueError("noise: expert choice uses none; pass None")
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T).to(gate_dtype(x_TD, self.w_gate))
            logit_TE = x_TD @ self.w_gate.to(x_TD.dtype)
            probability_TE = logit_TE.softmax(dim=-1)
            num_tokens, k = x_TD.shape[0], self.pairs_per_token
            chosen_TE = batchwise(
                probability_TE,
                blocks(num_tokens, self.scope, mask_T, x_TD.device),
                num_segments=num_blocks(num_tokens, self.scope),
                k=k,
            )
            return Routing.of_batch_choice(
                logit_sums=sums_of_logits(logit_TE, only_group(mask_T)),
                chosen_TE=chosen_TE,
                weight_TE=probability_TE,
                num_pairs=most_pairs(num_tokens, self.scope, k=k, num_experts=self.num_experts),
                mask_T=mask_T,
                threshold=logit_TE.new_zeros(()),
            )
