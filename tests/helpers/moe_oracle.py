"""The paper's equations as they read: loops over tokens and experts, nothing sorted, gathered or shared.

Everything is differentiable by plain autograd, so that gradients have the same oracle as values.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def softplus(value: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-value.abs())) + value.clamp_min(0)


def noisy_logits(
    x_TD: Tensor, w_gate: Tensor, w_noise: Tensor, noise_TE: Tensor, epsilon: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 4: the clean logits, the noise's standard deviation, and H(x)."""
    clean_TE, std_TE = x_TD @ w_gate, softplus(x_TD @ w_noise) + epsilon
    return clean_TE, std_TE, clean_TE + noise_TE * std_TE


def keep_topk(value_E: Tensor, k: int) -> list[int]:
    """Eq. 5: the k largest, by sorting."""
    values = value_E.tolist()
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def gates(logits_TE: Tensor, k: int) -> Tensor:
    """Eq. 3, dense: softmax over the kept logits, zero elsewhere."""
    rows = []
    for logits_E in logits_TE:
        kept = keep_topk(logits_E, k)
        largest = max(logits_E[kept].tolist())
        total = sum(torch.exp(logits_E[i] - largest) for i in kept)
        zero = logits_E.new_zeros(())
        row = [torch.exp(logits_E[i] - largest) / total if i in kept else zero for i in range(len(logits_E))]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def kth_excluding(value_E: Tensor, k: int, excluded: int) -> Tensor:
    """Eq. 8: the k-th highest component, leaving one out."""
    values = value_E.tolist()
    others = [i for i in range(len(values)) if i != excluded]
    return value_E[sorted(others, key=lambda i: -values[i])[k - 1]]


def probability_in_topk(clean_TE: Tensor, std_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    """Eq. 9, entry by entry."""
    num_tokens, num_experts = clean_TE.shape
    entries = [
        (clean_TE[t, i] - kth_excluding(noisy_TE[t], k, i)) / std_TE[t, i]
        for t in range(num_tokens)
        for i in range(num_experts)
    ]
    z_TE = torch.stack(entries).reshape(num_tokens, num_experts)
    return 0.5 * (1 + torch.erf(z_TE / math.sqrt(2)))


def feed_forward(w_in: Tensor, w_out: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """One function per expert: relu(x W_in) W_out."""
    return [lambda x, i=i, o=o: torch.clamp_min(x @ i, 0) @ o for i, o in zip(w_in, w_out, strict=True)]


def mixture(x_TD: Tensor, gates_TE: Tensor, experts: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """Eq. 1, dense: every expert computed for every token."""
    return torch.stack(
        [
            sum(gate * expert(x_D) for gate, expert in zip(gate_E, experts, strict=True))
            for x_D, gate_E in zip(x_TD, gates_TE, strict=True)
        ]
    )


def squared_cv(value_E: Tensor) -> Tensor:
    """Eq. 7 and 11: population variance over squared mean."""
    mean = sum(value_E) / len(value_E)
    return sum((v - mean) ** 2 for v in value_E) / len(value_E) / mean**2


def dense_gates(routing) -> Tensor:
    """The matrix G(x), T x E, of a Routing's entries; unused pairs are left out."""
    rows = torch.zeros(len(routing.pairs_T), routing.num_experts, dtype=routing.weight_N.dtype)
    for token, expert, weight in zip(
        routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True
    ):
        if expert < routing.num_experts:
            rows[token, expert] += weight
    return rows
