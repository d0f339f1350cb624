"""The gates that a model's mixture may have: what each is made of, and how it is built."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..moe.gating.balanced import Balanced
from ..moe.gating.expert_choice import ExpertChoice
from ..moe.gating.gate import Gate
from ..moe.gating.group_gates import BalancedGroups, GroupGates, NoisyTopKGroups
from ..moe.gating.hierarchical import Hierarchical
from ..moe.gating.noisy_topk import NoisyTopK
from ..moe.gating.sigmoid_topk import SigmoidTopK
from ..moe.gating.softmax import Softmax
from ..moe.gating.softmax_topk import SoftmaxTopK
from ..moe.kernels.choice import MOST_CHOSEN_FROM


@dataclass(frozen=True, kw_only=True)
class NoisyTopKGate:
    """The paper's gate (eq. 3 to 5)."""

    kind: Literal["noisy_topk"] = "noisy_topk"
    noise_epsilon: float = field(
        default=0.0, metadata={"doc": "added to the noise's deviation (paper 0, its authors' code 0.01)"}
    )


@dataclass(frozen=True, kw_only=True)
class HierarchicalGate:
    """A gate over groups and one in each group (eq. 12); k is the product of the choices of both."""

    kind: Literal["hierarchical"] = "hierarchical"
    num_groups: int = field(default=16, metadata={"doc": "groups of equally many experts"})
    k_primary: int = field(default=2, metadata={"doc": "groups per token; k_primary must divide k"})
    primary: Literal["noisy_topk", "balanced"] = field(
        default="noisy_topk", metadata={"doc": "the gate over the groups"}
    )
    secondary: Literal["noisy_topk", "balanced"] = field(
        default="noisy_topk", metadata={"doc": "the gates in the groups"}
    )
    noise_epsilon: float = field(default=0.0, metadata={"doc": "added to the noise's deviation"})
    scope: int | None = field(
        default=None,
        metadata={"doc": "of balanced levels: tokens that compete in training; none: a whole batch"},
    )
    most_groups: int | None = field(
        default=None,
        metadata={
            "doc": "of a balanced primary gate: groups of a token in evaluation at most; none: no bound"
        },
    )
    most_per_group: int | None = field(
        default=None,
        metadata={
            "doc": "of balanced secondary gates: experts of a token in each of its groups in evaluation at "
            "most; none: no bound"
        },
    )


@dataclass(frozen=True, kw_only=True)
class BalancedGate:
    """Strictly balanced (eq. 15 to 20): equal batches in training, trained thresholds in evaluation."""

    kind: Literal["balanced"] = "balanced"
    scope: int | None = field(
        default=None, metadata={"doc": "consecutive tokens that compete in training; none: a whole batch"}
    )
    most_per_token: int | None = field(
        default=None, metadata={"doc": "experts of a token in evaluation at most; none: no bound"}
    )


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceGate:
    """Each expert takes its best tokens (Zhou et al. 2022), in evaluation too: it sees a text's future."""

    kind: Literal["expert_choice"] = "expert_choice"
    scope: int | None = field(
        default=None, metadata={"doc": "consecutive tokens that compete; none: all of a batch"}
    )


@dataclass(frozen=True, kw_only=True)
class SoftmaxGate:
    """All experts for every token (eq. 2); k is the number of experts."""

    kind: Literal["softmax"] = "softmax"


@dataclass(frozen=True, kw_only=True)
class SoftmaxTopKGate:
    """Top-k without noise; with k = 1, renormalize false and jitter 0.01 the gate of Switch."""

    kind: Literal["softmax_topk"] = "softmax_topk"
    renormalize: bool = field(
        default=True, metadata={"doc": "whether a token's weights sum to 1, or stay its probabilities"}
    )
    jitter: float = field(
        default=0.0,
        metadata={"doc": "in training the gate's input is multiplied by 1 - jitter to 1 + jitter"},
    )


@dataclass(frozen=True, kw_only=True)
class SigmoidTopKGate:
    """Sigmoid scores and a bias that balances without a loss (DeepSeek-V3)."""

    kind: Literal["sigmoid_topk"] = "sigmoid_topk"
    bias_rate: float = field(default=1e-3, metadata={"doc": "step of the bias after each update"})


GateConfig = (
    NoisyTopKGate
    | HierarchicalGate
    | BalancedGate
    | ExpertChoiceGate
    | SoftmaxGate
    | SoftmaxTopKGate
    | SigmoidTopKGate
)


def trains_thresholds(config: GateConfig) -> bool:
    """Whether the gate has thresholds, which the threshold loss alone trains and evaluation needs."""
    if isinstance(config, HierarchicalGate):
        return "balanced" in (config.primary, config.secondary)
    return isinstance(config, BalancedGate)


def require_gate(config: GateConfig, *, num_experts: int, k: int, where: str) -> None:
    """Refuse a gate that cannot be built for these experts, naming fields as the command line does.

    where: what stands before their names, such as `model.`. A gate by itself does not know where it stands,
    and refuses nothing.
    """
    match config:
        case NoisyTopKGate():
            _require_epsilon(config.noise_epsilon, where)
        case HierarchicalGate():
            _require_hierarchy(config, num_experts=num_experts, k=k, where=where)
        case BalancedGate():
            _require_scope(config.scope, where)
            _require_most(
                config.most_per_token,
                num_experts,
                name=f"{where}gate.most-per-token",
                choices=f"{where}num-experts",
            )
        case ExpertChoiceGate():
            _require_scope(config.scope, where)
        case SoftmaxGate():
            if k != num_experts:
                raise ValueError(
                    f"{where}k ({k}) must equal {where}num-experts ({num_experts}) with {where}gate.kind "
                    "softmax, which chooses all experts"
                )
        case SoftmaxTopKGate():
            if not 0 <= config.jitter < 1:
                raise ValueError(f"{where}gate.jitter ({config.jitter}) must be at least 0 and below 1")
        case SigmoidTopKGate():
            if not config.bias_rate >= 0:
                raise ValueError(f"{where}gate.bias-rate ({config.bias_rate}) must be at least 0")


def _require_hierarchy(config: HierarchicalGate, *, num_experts: int, k: int, where: str) -> None:
    _require_epsilon(config.noise_epsilon, where)
    _require_scope(config.scope, where)
    if config.scope is not None and not trains_thresholds(config):
        raise ValueError(
            f"{where}gate.scope ({config.scope}) is of balanced levels; set {where}gate.primary or "
            f"{where}gate.secondary to balanced, or leave it at none"
        )
    if config.num_groups < 1 or num_experts % config.num_groups:
        raise ValueError(
            f"{where}gate.num-groups ({config.num_groups}) must divide {where}num-experts ({num_experts})"
        )
    if not 1 <= config.k_primary <= config.num_groups or k % config.k_primary:
        raise ValueError(
            f"{where}gate.k-primary ({config.k_primary}) must be between 1 and {where}gate.num-groups "
            f"({config.num_groups}), and divide {where}k ({k})"
        )
    if k // config.k_primary > num_experts // config.num_groups:
        raise ValueError(
            f"{where}k ({k}) must be at most {where}gate.k-primary ({config.k_primary}) times the experts "
            f"of a group ({num_experts // config.num_groups})"
        )
    _require_most_of_levels(config, group_size=num_experts // config.num_groups, where=f"{where}gate.")


def _require_most_of_levels(config: HierarchicalGate, *, group_size: int, where: str) -> None:
    """A level that is not balanced has a fixed number of choices, and no bound."""
    num_groups, in_group = (config.num_groups, f"{where}num-groups"), (group_size, "the experts of a group")
    for name, most, level, kind, (num_choices, choices) in (
        ("most-groups", config.most_groups, "primary", config.primary, num_groups),
        ("most-per-group", config.most_per_group, "secondary", config.secondary, in_group),
    ):
        if most is not None and kind != "balanced":
            raise ValueError(
                f"{where}{name} ({most}) is of a balanced level; set {where}{level} to balanced, or leave it "
                "at none"
            )
        _require_most(most, num_choices, name=f"{where}{name}", choices=choices)


def _require_most(most: int | None, num_choices: int, *, name: str, choices: str) -> None:
    if most is not None and not 1 <= most <= num_choices:
        raise ValueError(f"{name} ({most}) must be between 1 and {choices} ({num_choices}), or none")


def _require_epsilon(noise_epsilon: float, where: str) -> None:
    if not noise_epsilon >= 0:
        raise ValueError(f"{where}gate.noise-epsilon ({noise_epsilon}) must be at least 0")


def _require_scope(scope: int | None, where: str) -> None:
    if scope is not None and scope < 1:
        raise ValueError(f"{where}gate.scope ({scope}) must be at least 1 token, or none")


def build_gate(
    config: GateConfig, *, width: int, num_experts: int, k: int, kernel: str | None, **options: Any
) -> Gate:
    """The gate, freshly initialised. kernel: of those that have it. options: device and dtype."""
    common: dict[str, Any] = {"width": width, "num_experts": num_experts, **options}
    match config:
        case NoisyTopKGate():
            kernel = kernel if num_experts <= MOST_CHOSEN_FROM else None
            return NoisyTopK(k=k, noise_epsilon=config.noise_epsilon, kernel=kernel, **common)
        case BalancedGate():
            return Balanced(k=k, scope=config.scope, most_per_token=config.most_per_token, **common)
        case ExpertChoiceGate():
            return ExpertChoice(k=k, scope=config.scope, **common)
        case SoftmaxGate():
            return Softmax(**common)
        case SoftmaxTopKGate():
            return SoftmaxTopK(k=k, renormalize=config.renormalize, jitter=config.jitter, **common)
        case SigmoidTopKGate():
            return SigmoidTopK(k=k, bias_rate=config.bias_rate, **common)
        case HierarchicalGate():
            return _hierarchy(config, width=width, num_experts=num_experts, k=k, kernel=kernel, **options)


def _hierarchy(
    config: HierarchicalGate, *, width: int, num_experts: int, k: int, kernel: str | None, **options: Any
) -> Hierarchical:
    groups: dict[str, Any] = {
        "width": width,
        "num_groups": config.num_groups,
        "group_size": num_experts // config.num_groups,
        "k": k // config.k_primary,
        "kernel": kernel,
        **options,
    }
    primary: Gate
    secondary: GroupGates
    if config.primary == "balanced":
        primary = Balanced(
            width=width,
            num_experts=config.num_groups,
            k=config.k_primary,
            scope=config.scope,
            most_per_token=config.most_groups,
            **options,
        )
    else:
        primary = NoisyTopK(
            width=width,
            num_experts=config.num_groups,
            k=config.k_primary,
            noise_epsilon=config.noise_epsilon,
            kernel=kernel,
            **options,
        )
    if config.secondary == "balanced":
        secondary = BalancedGroups(scope=config.scope, most_per_token=config.most_per_group, **groups)
    else:
        secondary = NoisyTopKGroups(noise_epsilon=config.noise_epsilon, **groups)
    return Hierarchical(primary=primary, secondary=secondary)
