"""Small layers, gates and experts to state laws about. The next gate or kind of experts is one line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsegate.moe.experts.experts import Experts
from sparsegate.moe.experts.feed_forward import FeedForward
from sparsegate.moe.experts.modules import ModuleExperts
from sparsegate.moe.experts.swiglu import SwiGLU
from sparsegate.moe.gating.balanced import Balanced
from sparsegate.moe.gating.capacity import Capacity
from sparsegate.moe.gating.expert_choice import ExpertChoice
from sparsegate.moe.gating.gate import Gate
from sparsegate.moe.gating.group_gates import BalancedGroups, GroupGates, NoisyTopKGroups
from sparsegate.moe.gating.hierarchical import Hierarchical
from sparsegate.moe.gating.noisy_topk import NoisyTopK
from sparsegate.moe.gating.sigmoid_topk import SigmoidTopK
from sparsegate.moe.gating.softmax import Softmax
from sparsegate.moe.gating.softmax_topk import SoftmaxTopK
from sparsegate.moe.layer import MoE
from sparsegate.moe.routing import Routing, only_group, sums_of_logits

WIDTH = 5
NUM_EXPERTS = 6


def _hierarchy(
    primary: Callable[..., Gate],
    secondary: Callable[..., GroupGates],
    *,
    width: int,
    num_experts: int,
    **options: Any,
) -> Hierarchical:
    """Two groups of three for each token, one expert of two in each."""
    return Hierarchical(
        primary=primary(width=width, num_experts=NUM_GROUPS, k=2, **options),
        secondary=secondary(
            width=width, num_groups=NUM_GROUPS, group_size=num_experts // NUM_GROUPS, k=1, **options
        ),
    )


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
    "topk": lambda **kw: SoftmaxTopK(k=2, **kw),
    "switch": lambda **kw: SoftmaxTopK(k=1, renormalize=False, jitter=0.1, **kw),
    "sigmoid": lambda **kw: SigmoidTopK(k=2, **kw),
    "expert_choice": lambda **kw: ExpertChoice(k=2, **kw),
    "balanced": lambda **kw: Balanced(k=2, **kw),
    "last_dropped": lambda **kw: Capacity(NoisyTopK(k=2, **kw), factor=1),
    "lightest_dropped": lambda **kw: Capacity(NoisyTopK(k=2, **kw), factor=1.25, drop="lightest"),
    "hierarchical": lambda **kw: _hierarchy(NoisyTopK, NoisyTopKGroups, **kw),
    "hierarchical_balanced": lambda **kw: _hierarchy(Balanced, BalancedGroups, **kw),
    "noisy_over_balanced": lambda **kw: _hierarchy(NoisyTopK, BalancedGroups, **kw),
    "balanced_over_noisy": lambda **kw: _hierarchy(Balanced, NoisyTopKGroups, **kw),
}
NUM_GROUPS = 3
# Gates whose weights of one token need not sum to 1.
NOT_NORMALIZED = {"switch", "expert_choice", "last_dropped", "lightest_dropped"}
# Hierarchies in which all experts of a group may pass a token by: its weight is then lost.
PASSED_BY = {"hierarchical_balanced", "noisy_over_balanced"}
# Gates that answer for more pairs than they use: the sums tell what was asked for.
DROPS = {"last_dropped", "lightest_dropped"}
# Gates whose noise cannot be given: as many draws as a token has groups, which varies.
DRAWS_ITS_OWN = {"balanced_over_noisy"}
# Weights that are not computed for a token: those of the groups that were not chosen.
NOT_MET = {
    name: WIDTH * (NUM_EXPERTS // NUM_GROUPS) * matrices
    for name, matrices in {
        "hierarchical": 2,
        "hierarchical_balanced": 1,
        "noisy_over_balanced": 1,
        "balanced_over_noisy": 2,
    }.items()
}
EXPERTS: dict[str, Callable[..., Experts]] = {
    "feed_forward": lambda **kw: FeedForward(hidden=4, **kw),
    "swiglu": lambda **kw: SwiGLU(hidden=4, **kw),
    "modules": lambda **kw: _modules(**kw),
}


def a_gate(name: str, *, dtype: torch.dtype = torch.float64) -> Gate:
    """The gate of that name over WIDTH and NUM_EXPERTS, its weights no longer zero."""
    gate = GATES[name](width=WIDTH, num_experts=NUM_EXPERTS, dtype=dtype)
    for parameter_name, parameter in gate.named_parameters():
        # Thresholds stay where probabilities are.
        mean = -2.0 if parameter_name.endswith("log_threshold") else 0.0
        nn.init.normal_(parameter, mean=mean, std=0.5)
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
        logit_sums=sums_of_logits(logit_TE, only_group(mask_T)),
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        mask_T=mask_T,
        load_E=None,
    )


def dense(routing: Routing) -> Tensor:
    """G(x), [T, E], differentiable; unused pairs are left out."""
    weight_TE = routing.weight_N.new_zeros(len(routing.pairs_T), routing.num_experts + 1)
    index = (routing.token_N, routing.expert_N)
    return weight_TE.index_put(index, routing.weight_N, accumulate=True)[:, : routing.num_experts]


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a scalar, whose graph stays; zeros for what it does not depend on."""
    return torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True, materialize_grads=True)
