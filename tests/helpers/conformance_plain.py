"""The paper's layer in plain loops over experts, every expert computed for every token, and faults to plant.

It shares no code with `sparsegate.moe`, nor with the equations of the suite. Each part can be replaced by a
faulty one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsegate.evaluation.conformance.implementation import Implementation

WIDTH, HIDDEN, NUM_EXPERTS, K = 12, 10, 6, 2


def softplus(value: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-value.abs())) + value.clamp_min(0)


def kept(noisy_TE: Tensor, k: int) -> Tensor:
    """1 where fewer than k others are larger, else 0."""
    columns = [(noisy_TE > noisy_TE[:, i : i + 1]).sum(dim=1) < k for i in range(NUM_EXPERTS)]
    return torch.stack(columns, dim=1).to(noisy_TE.dtype)


def softmax_of_kept(noisy_TE: Tensor, k: int) -> Tensor:
    # Ties are broken by the place, as the zeros of a new gate in evaluation mode need.
    place_E = torch.arange(NUM_EXPERTS).to(noisy_TE) * 1e-30
    weight_TE = (noisy_TE - noisy_TE.detach().amax(dim=1, keepdim=True)).exp() * kept(noisy_TE - place_E, k)
    return weight_TE / weight_TE.sum(dim=1, keepdim=True)


def kth_excluding(noisy_TE: Tensor, k: int, i: int) -> Tensor:
    others = [j for j in range(NUM_EXPERTS) if j != i]
    return noisy_TE[:, others].topk(k, dim=1).values[:, -1]


def normal_cdf(value: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-value / math.sqrt(2))


def probability(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    columns = [
        normal_cdf((clean_TE[:, i] - kth_excluding(noisy_TE, k, i)) / std_TE[:, i])
        for i in range(NUM_EXPERTS)
    ]
    return torch.stack(columns, dim=1)


def squared_cv(value_E: Tensor) -> Tensor:
    mean = value_E.sum() / NUM_EXPERTS
    return ((value_E / mean - 1) ** 2).sum() / NUM_EXPERTS


def weighted_sum(gate_TE: Tensor, outputs: list[Tensor]) -> Tensor:
    return sum(gate_TE[:, i : i + 1] * output_TD for i, output_TD in enumerate(outputs))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the layer is made of; a fault replaces one or two of them."""

    start: Callable[["Plain"], None] = lambda layer: None
    logits: Callable[["Plain", Tensor], Tensor] = lambda layer, x_TD: x_TD @ layer.w_gate
    std: Callable[["Plain", Tensor], Tensor] = lambda layer, x_TD: softplus(x_TD @ layer.w_noise)
    draw: Callable[[Tensor], Tensor] = torch.randn_like
    noisy: Callable[..., Tensor] = lambda clean_TE, std_TE, noise_TE: clean_TE + noise_TE * std_TE
    noise_in_evaluation: bool = False
    gates: Callable[[Tensor, int], Tensor] = softmax_of_kept
    # How the gates that the output is made with, and those of the importance, follow from the gates.
    for_output: Callable[[Tensor], Tensor] = lambda gate_TE: gate_TE
    for_importance: Callable[[Tensor, Tensor], Tensor] = lambda gate_TE, noisy_TE: gate_TE
    probability: Callable[..., Tensor] = probability
    squared_cv: Callable[[Tensor], Tensor] = squared_cv
    expert: Callable[["Plain", int, Tensor], Tensor] = lambda layer, i, x_TD: (
        (x_TD @ layer.w_in[i]).clamp_min(0) @ layer.w_out[i]
    )
    combine: Callable[[Tensor, list[Tensor]], Tensor] = weighted_sum
    finish: Callable[["Plain", Tensor, Tensor | None], Tensor] = lambda layer, y_TD, mask_T: y_TD
    mask_for_output: Callable[[Tensor | None], Tensor | None] = lambda mask_T: mask_T
    mask_for_losses: Callable[[Tensor | None], Tensor | None] = lambda mask_T: mask_T
    swapped: tuple[str, ...] = ("w_gate", "w_noise", "w_in", "w_out")


def without(value_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    return value_TE if mask_T is None else value_TE * mask_T[:, None]


class Plain(nn.Module):
    def __init__(self, parts: Parts):
        super().__init__()
        self.parts = parts
        self.w_gate = nn.Parameter(torch.zeros(WIDTH, NUM_EXPERTS))
        self.w_noise = nn.Parameter(torch.zeros(WIDTH, NUM_EXPERTS))
        self.w_in = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, HIDDEN) / 3)
        self.w_out = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / 3)
        parts.start(self)

    def logits(self, x_TD):
        return self.parts.logits(self, x_TD)

    def std(self, x_TD):
        return self.parts.std(self, x_TD)

    def noisy(self, x_TD, noise_TE):
        clean_TE = self.logits(x_TD)
        if not self.training and not self.parts.noise_in_evaluation:
            return clean_TE
        noise_TE = self.parts.draw(clean_TE) if noise_TE is None else noise_TE
        return self.parts.noisy(clean_TE, self.std(x_TD), noise_TE)

    def gates(self, x_TD, mask_T, noise_TE):
        return without(self.parts.gates(self.noisy(x_TD, noise_TE), K), mask_T)

    def forward(self, x_TD, mask_T=None, noise_TE=None):
        outputs = [self.parts.expert(self, i, x_TD) for i in range(NUM_EXPERTS)]
        gate_TE = self.parts.for_output(self.gates(x_TD, self.parts.mask_for_output(mask_T), noise_TE))
        return self.parts.finish(self, self.parts.combine(gate_TE, outputs), mask_T)

    def load(self, x_TD, mask_T, noise_TE):
        noisy_TE = self.noisy(x_TD, noise_TE)
        p_TE = self.parts.probability(self.logits(x_TD), self.std(x_TD), noisy_TE, K)
        return without(p_TE, self.parts.mask_for_losses(mask_T)).sum(dim=0)

    def importance_loss(self, x_TD, mask_T, noise_TE):
        noisy_TE = self.noisy(x_TD, noise_TE)
        gate_TE = self.parts.for_importance(self.parts.gates(noisy_TE, K), noisy_TE)
        return self.parts.squared_cv(without(gate_TE, self.parts.mask_for_losses(mask_T)).sum(dim=0))

    def load_loss(self, x_TD, mask_T, noise_TE):
        return self.parts.squared_cv(self.load(x_TD, mask_T, noise_TE))

    @torch.no_grad()
    def swap(self, permutation):
        for name in self.parts.swapped:
            weight = getattr(self, name)
            weight.copy_(weight[:, permutation] if name in ("w_gate", "w_noise") else weight[permutation])


def plain(**faults) -> Implementation:
    """The layer of the paper, but for the parts that are given."""
    layer = Plain(replace(Parts(), **faults))
    return Implementation(
        module=layer,
        width=WIDTH,
        num_experts=NUM_EXPERTS,
        k=K,
        forward=layer,
        takes_mask=True,
        takes_noise=True,
        gates=layer.gates,
        logits=layer.logits,
        noise_std=layer.std,
        load=layer.load,
        importance_loss=layer.importance_loss,
        load_loss=layer.load_loss,
        expert=lambda index, rows_RD: layer.parts.expert(layer, index, rows_RD),
        swap=layer.swap,
    )
