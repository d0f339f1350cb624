"""Strictly balanced gating (appendix F of the paper): equal batches for all experts, then thresholds."""

import math

import torch
from torch import Tensor, nn

from ..precision import autocast_off
from ..routing import Routing, only_group, sums_of_logits
from .batchwise import batchwise, blocks, most_pairs, num_blocks, require_scope
from .gate import Gate, gate_dtype, require_experts, without_padding


class Balanced(Gate):
    """Softmax gating (eq. 15) under a mask, renormalised (eq. 16); k experts per token on average, no noise.

    In training each expert takes its k T / E best tokens (eq. 18): perfect balance. In evaluation a token
    goes to the experts whose probability is above their thresholds (eq. 19), whatever the other tokens are.
    The thresholds are parameters that `threshold_loss` (eq. 20) trains, and nothing else does: add it to the
    loss. (Without it, DistributedDataParallel misses their gradient.) A token that no expert takes has the
    output 0; `num_unrouted` counts them.

    A warning for autoregressive models, as for every choice over a batch: in training, which experts a token
    gets depends on the tokens after it, and the model may learn to read the future from that. Evaluation is
    sound: there the thresholds decide. The gap between the two is the price.

    width: of the input. k: experts per token on average. scope: number of consecutive tokens that compete in
    training, such as the length of a sequence; None: all tokens of a call, and with micro-batches or ranks
    each part's by itself. most_per_token: in evaluation a token keeps this many experts at most, its most
    probable ones; None: all that are above their thresholds, and memory for T * E pairs.
    w_gate starts normal with variance 0.1/width: equal scores would give every expert the same tokens. The
    parameter log_threshold [E] starts at log(1/E); as a logarithm it takes optimizer steps that fit small
    probabilities.
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
        most_per_token: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_experts(num_experts=num_experts, k=k)
        require_scope(scope)
        self.most_per_token = require_most_per_token(most_per_token, num_experts)
        self.num_experts = num_experts
        self.pairs_per_token = k
        self.scope = scope
        self.w_gate = nn.Parameter(torch.empty(width, num_experts, device=device, dtype=dtype))
        self.log_threshold = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def selects_over_batch(self) -> bool:
        return self.training

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gate, std=(0.1 / self.w_gate.shape[0]) ** 0.5)
        nn.init.constant_(self.log_threshold, -math.log(self.num_experts))

    def extra_repr(self) -> str:
        width, num_experts = self.w_gate.shape
        return f"width={width}, num_experts={num_experts}, k={self.pairs_per_token}, scope={self.scope}"

    def ops_per_token(self) -> int:
        return self.w_gate.numel()

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        """ValueError: noise is given, or evaluation with thresholds that were never trained."""
        if noise is not None:
            raise ValueError("noise: a strictly balanced gate uses none; pass None")
        with autocast_off(x_TD.device):
            x_TD = without_padding(x_TD, mask_T).to(gate_dtype(x_TD, self.w_gate))
            logit_TE = x_TD @ self.w_gate.to(x_TD.dtype)
            log_threshold_E = self.log_threshold.to(x_TD.dtype)
            if not self.training:
                require_trained(self.log_threshold, num_experts=self.num_experts)
                expert_TK, weight_TK = above_threshold(
                    logit_TE, log_threshold_E, most_per_token=self.most_per_token
                )
                return Routing.of_token_choice(
                    logit_sums=sums_of_logits(logit_TE, only_group(mask_T)),
                    expert_TK=expert_TK,
                    weight_TK=weight_TK,
                    mask_T=mask_T,
                    load_E=None,
                )
            num_tokens, k = x_TD.shape[0], self.pairs_per_token
            probability_TE = logit_TE.softmax(dim=-1)
            segment_T = blocks(num_tokens, self.scope, mask_T, x_TD.device)
            chosen_TE = batchwise(
                probability_TE, segment_T, num_segments=num_blocks(num_tokens, self.scope), k=k
            )
            loss_T = threshold_terms(probability_TE, chosen_TE, log_threshold_E).sum(dim=1)
            return Routing.of_batch_choice(
                logit_sums=sums_of_logits(logit_TE, only_group(mask_T)),
                chosen_TE=chosen_TE,
                weight_TE=masked_softmax(logit_TE, chosen_TE),
                num_pairs=most_pairs(num_tokens, self.scope, k=k, num_experts=self.num_experts),
                mask_T=mask_T,
                threshold=(loss_T if mask_T is None else loss_T.masked_fill(~mask_T, 0.0)).sum(),
            )


def masked_softmax(logit_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Eq. 16: softmax over the entries of the mask, 0 elsewhere, and 0 in a row without any."""
    any_T1 = mask_TE.any(dim=-1, keepdim=True)
    # A row of -inf alone would be NaN in value and gradient.
    kept_TE = logit_TE.masked_fill(~mask_TE & any_T1, -torch.inf)
    return kept_TE.softmax(dim=-1).where(mask_TE, 0.0)


def threshold_terms(probability_TE: Tensor, chosen_TE: Tensor, log_threshold: Tensor) -> Tensor:
    """The summands of eq. 20, [T, E]: how far each probability is on the wrong side of its threshold.

    Each is at least 0, and all are 0 where both masks agree. The probabilities are constants here, so that
    the loss trains the thresholds and nothing else. log_threshold: [E], or [T, E].
    """
    threshold = log_threshold.exp()
    probability_TE = probability_TE.detach()
    is_above_TE = probability_TE > threshold
    return (is_above_TE.to(probability_TE.dtype) - chosen_TE.to(probability_TE.dtype)) * (
        probability_TE - threshold
    )


def above_threshold(logit_TE: Tensor, log_threshold: Tensor, *, most_per_token: int) -> tuple[Tensor, Tensor]:
    """Eq. 19 and 16: of each token the experts above their thresholds, and their weights, [T, K].

    The most probable first; where there are fewer than K the rest is `num_experts` with weight 0.
    log_threshold: [E], or [T, E].
    """
    log_probability_TE = logit_TE.log_softmax(dim=-1)
    # A NaN is on neither side, and must not vanish.
    above_TE = ~(log_probability_TE.detach() <= log_threshold.detach())
    top_TK, expert_TK = log_probability_TE.masked_fill(~above_TE, -torch.inf).topk(most_per_token, dim=-1)
    is_used_TK = ~(top_TK == -torch.inf)
    weight_TK = masked_softmax(top_TK.where(is_used_TK, 0.0), is_used_TK)
    return expert_TK.where(is_used_TK, logit_TE.shape[1]), weight_TK


def require_most_per_token(most_per_token: int | None, num_experts: int) -> int:
    """The bound, which is all experts where there is none. Refuses one that is out of range."""
    if most_per_token is None:
        return num_experts
    if not 1 <= most_per_token <= num_experts:
        raise ValueError(
            f"most_per_token ({most_per_token}) must be between 1 and num_experts ({num_experts}), "
            "or None for no bound"
        )
    return most_per_token


def require_trained(log_threshold: Tensor, *, num_experts: int) -> None:
    """Refuse thresholds that never moved. It waits for the device; compiled graphs go without."""
    if torch.compiler.is_compiling() or log_threshold.is_meta:
        return
    start = -math.log(num_experts)
    # After a conversion the start is as precise as it was before.
    tolerance = 1e-6 if log_threshold.dtype in (torch.float64, torch.float32) else 1e-2
    now = log_threshold.detach()
    first = now.flatten()[0]
    if bool((now == first).all()) and abs(float(first) - start) <= tolerance * abs(start):
        raise ValueError(
            f"log_threshold ({start:.4g} for every expert) was never trained, and evaluation selects by it; "
            "add threshold_loss(routing) to the loss in training, or load trained weights"
        )
