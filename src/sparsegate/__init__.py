"""Sparsely-gated mixtures of experts, and the paper's models around them.

The public names stand here. Each is imported when it is first used, so that `sparsegate --help` need not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluation.conformance.implementation import Implementation as Implementation
    from .moe.experts.feed_forward import FeedForward as FeedForward
    from .moe.experts.modules import ModuleExperts as ModuleExperts
    from .moe.experts.swiglu import SwiGLU as SwiGLU
    from .moe.gating.balanced import Balanced as Balanced
    from .moe.gating.capacity import Capacity as Capacity
    from .moe.gating.expert_choice import ExpertChoice as ExpertChoice
    from .moe.gating.group_gates import BalancedGroups as BalancedGroups
    from .moe.gating.group_gates import NoisyTopKGroups as NoisyTopKGroups
    from .moe.gating.hierarchical import Hierarchical as Hierarchical
    from .moe.gating.noisy_topk import NoisyTopK as NoisyTopK
    from .moe.gating.sigmoid_topk import SigmoidTopK as SigmoidTopK
    from .moe.gating.softmax import Softmax as Softmax
    from .moe.gating.softmax_topk import SoftmaxTopK as SoftmaxTopK
    from .moe.layer import MoE as MoE
    from .moe.losses import importance_loss as importance_loss
    from .moe.losses import load_loss as load_loss
    from .moe.losses import switch_loss as switch_loss
    from .moe.losses import threshold_loss as threshold_loss
    from .moe.losses import z_loss as z_loss
    from .moe.routing import BalanceSums as BalanceSums
    from .moe.routing import Routing as Routing
    from .recipes.load import load as load

_HOMES = {
    "BalanceSums": "moe.routing",
    "Balanced": "moe.gating.balanced",
    "BalancedGroups": "moe.gating.group_gates",
    "Capacity": "moe.gating.capacity",
    "ExpertChoice": "moe.gating.expert_choice",
    "FeedForward": "moe.experts.feed_forward",
    "Hierarchical": "moe.gating.hierarchical",
    "ModuleExperts": "moe.experts.modules",
    "Implementation": "evaluation.conformance.implementation",
    "MoE": "moe.layer",
    "NoisyTopK": "moe.gating.noisy_topk",
    "NoisyTopKGroups": "moe.gating.group_gates",
    "Routing": "moe.routing",
    "SigmoidTopK": "moe.gating.sigmoid_topk",
    "Softmax": "moe.gating.softmax",
    "SoftmaxTopK": "moe.gating.softmax_topk",
    "importance_loss": "moe.losses",
    "SwiGLU": "moe.experts.swiglu",
    "load": "recipes.load",
    "load_loss": "moe.losses",
    "switch_loss": "moe.losses",
    "threshold_loss": "moe.losses",
    "z_loss": "moe.losses",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
