"""Small layers, gates and experts to state laws about. The next gate or kind of experts is one line here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsegate.moe.experts.experts import Experts
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.modules import ModuleExperts
from sparsegate.moe.gating.gate import Gate
from sparsegate.moe.gating.hierarchical import Hierarchical
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.gating.softmax import Softmax
from sparsegate.moe.gating.topk import TopK
from sparsegate.moe.layer import MoE
from sparsegate.moe.routing import Routing

WIDTH = 5
NUM_EXPERTS = 6


def _modules(*, width: int, num_experts: int, dtype: torch.dtype) -> ModuleExperts:
    """Networks of different sizes and, unlike ReLU, smooth."""
    return ModuleExperts(
        [
            nn.Sequential(
                nn.Linear(width, hidden, dtype=dtype), nn.Tanh(), nn.Linear(hidden, width, dtype=dtype)
            )
            for hidden in range(3, 3 + num_experts)
        ]
    )


GATES: dict[str, Callable[..., Gate]] = {
    "noisy_topk": lambda **kw: NoisyTopK(k=2, **kw),
    "noisy_top1": lambda **kw: NoisyTopK(k=1, **kw),
    "noisy_all": lambda **kw: NoisyTopK(k=kw["num_experts"], noise_epsilon=1e-2, **kw),
    "softmax": lambda **kw: Softmax(**kw),
    "topk": lambda **kw: TopK(k=2, **kw),
    "switch": lambda **kw: TopK(k=1, renormalize=False, jitter=0.1, **kw),
    "hierarchical": lambda **kw: Hierarchical(num_groups=3, k_primary=2, k_secondary=1, **kw),
}
# Gates whose weights of one token need not sum to 1.
NOT_NORMALIZED = {"switch"}
# Weights that are not computed for a token: those of the groups that were not chosen.
NOT_MET = {"hierarchical": 2 * WIDTH * (NUM_EXPERTS // 3)}
EXPERTS: dict[str, Callable[..., Experts]] = {
    "feed_forward": lambda **kw: FeedForward(hidden=4, **kw),
    "modules": lambda **kw: _modules(**kw),
}


def a_gate(name: str, *, dtype: torch.dtype = torch.float64) -> Gate:
    """The gate of that name over WIDTH and NUM_EXPERTS, its weights no longer zero."""
    gate = GATES[name](width=WIDTH, num_experts=NUM_EXPERTS, dtype=dtype)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, std=0.5)
    return gate


def some_experts(name: str, *, dtype: torch.dtype = torch.float64) -> Experts:
    return EXPERTS[name](width=WIDTH, num_experts=NUM_EXPERTS, dtype=dtype)


def a_moe(
    *,
    width: int = WIDTH,
    hidden: int = 7,
    num_experts: int = NUM_EXPERTS,
    k: int = 2,
    noise_epsilon: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> MoE:
    """The paper's layer with gate weights that are not zero, as after some training."""
    moe = MoE.noisy_topk(
        width=width, hidden=hidden, num_experts=num_experts, k=k, noise_epsilon=noise_epsilon, dtype=dtype
    )
    nn.init.normal_(moe.gate.w_gate, std=0.5)
    nn.init.normal_(moe.gate.w_noise, std=0.5)
    return moe


class Batch(NamedTuple):
    """Inputs that fit a layer: x [T, D] that needs a gradient, a noise draw [T, E], a cotangent [T, D]."""

    x_TD: Tensor
    noise_TE: Tensor
    cotangent_TD: Tensor


def a_batch(
    num_tokens: int, *, width: int = WIDTH, num_experts: int = NUM_EXPERTS, dtype: torch.dtype = torch.float64
) -> Batch:
    return Batch(
        torch.randn(num_tokens, width, dtype=dtype, requires_grad=True),
        torch.randn(num_tokens, num_experts, dtype=dtype),
        torch.randn(num_tokens, width, dtype=dtype),
    )


def noise_for(gate: Gate, num_tokens: int, *, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """A draw that the gate takes, None where it takes none."""
    return torch.randn(num_tokens, gate.noise_width, dtype=dtype) if gate.noise_width else None


def a_routing(
    expert_TK: Tensor, weight_TK: Tensor, *, num_experts: int = NUM_EXPERTS, mask_T: Tensor | None = None
) -> Routing:
    logit_TE = torch.zeros(len(expert_TK), num_experts, dtype=weight_TK.dtype)
    return Routing.of_token_choice(
        logit_TE=logit_TE, expert_TK=expert_TK, weight_TK=weight_TK, mask_T=mask_T, load_E=None
    )


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a scalar, whose graph stays; zeros for what it does not depend on."""
    return torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True, materialize_grads=True)
