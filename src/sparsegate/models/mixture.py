"""A mixture of experts as a model's configuration describes it: what is refused, and how it is built."""

import math
from typing import Literal, Protocol

import torch

from ..moe.experts.experts import Experts
from ..moe.experts.feed_forward import FeedForward
from ..moe.experts.swiglu import SwiGLU
from ..moe.gating.capacity import Capacity
from ..moe.layer import MoE
from .gates import GateConfig, build_gate, require_gate
from .holding import EVERYTHING, Holding


class MixtureFields(Protocol):
    """The fields of every configuration that describes a mixture; their meanings stand there."""

    @property
    def num_experts(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def experts(self) -> Literal["feed_forward", "swiglu"]: ...
    @property
    def gate(self) -> GateConfig: ...
    @property
    def capacity(self) -> float | None: ...
    @property
    def drop(self) -> Literal["last", "lightest"]: ...
    @property
    def expert_dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def recompute(self) -> bool: ...


def require_mixture(config: MixtureFields, *, where: str) -> None:
    """Refuse a mixture that cannot be built. where: what stands before its fields' names, as `model.`."""
    if not 1 <= config.k <= config.num_experts:
        raise ValueError(
            f"{where}k ({config.k}) must be between 1 and {where}num-experts ({config.num_experts})"
        )
    if config.hidden < 1:
        raise ValueError(f"{where}hidden ({config.hidden}) must be at least 1")
    require_gate(config.gate, num_experts=config.num_experts, k=config.k, where=where)
    if config.capacity is not None and not 1 <= config.capacity < math.inf:
        raise ValueError(
            f"{where}capacity ({config.capacity}) must be at least 1, or none; below 1, perfect balance "
            "drops tokens"
        )


def build_mixture(
    config: MixtureFields,
    *,
    width: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    holding: Holding = EVERYTHING,
) -> MoE:
    """The mixture, freshly initialised, with those of its experts that are held."""
    gate = build_gate(
        config.gate,
        width=width,
        num_experts=config.num_experts,
        k=config.k,
        kernel=holding.kernel,
        device=device,
        dtype=dtype,
    )
    if config.capacity is not None:
        gate = Capacity(gate, factor=config.capacity, drop=config.drop)
    kind = SwiGLU if config.experts == "swiglu" else FeedForward

    def make(own: range) -> Experts:
        return kind(
            width=width,
            hidden=config.hidden,
            num_experts=config.num_experts,
            storage=torch.bfloat16 if config.expert_dtype == "bfloat16" else None,
            recompute=config.recompute,
            kernel=holding.kernel,
            own=own,
            device=device if holding.experts_on is None else holding.experts_on,
            dtype=dtype,
        )

    return MoE(gate=gate, experts=holding.experts(make, config.num_experts))
