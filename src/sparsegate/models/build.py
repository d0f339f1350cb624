"""From a config to a model."""

import torch

from ..moe.experts.feed_forward import FeedForward
from ..moe.experts.swiglu import SwiGLU
from ..moe.gating.capacity import Capacity
from ..moe.layer import MoE
from .config import FeedForwardLM, LanguageModelConfig, MixtureLM
from .gates import build_gate
from .language_model import LanguageModel
from .layers import Dense, Layer, Mixture, Recurrent


def build(
    config: LanguageModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Build the model, freshly initialised; on the device "meta" without allocating its weights."""

    def recurrent() -> Recurrent:
        return Recurrent(
            width=config.width,
            units=config.lstm_units,
            projection=config.lstm_projection,
            bias=config.lstm_bias,
            device=device,
            dtype=dtype,
        )

    layers: dict[str, Layer]
    match config:
        case MixtureLM():
            mixture = Mixture(_mixture(config, device=device, dtype=dtype))
            layers = {"lstm1": recurrent(), "moe": mixture, "lstm2": recurrent()}
        case FeedForwardLM():
            dense = Dense(width=config.width, hidden=config.hidden, device=device, dtype=dtype)
            layers = {"lstm1": recurrent(), "dense": dense, "lstm2": recurrent()}
        case _:
            layers = {f"lstm{i + 1}": recurrent() for i in range(config.num_layers)}
    return LanguageModel(
        vocab_size=config.vocab_size,
        width=config.width,
        layers=layers,
        dropout=config.dropout,
        softmax_samples=config.softmax_samples,
        device=device,
        dtype=dtype,
    )


def _mixture(config: MixtureLM, *, device: torch.device | str | None, dtype: torch.dtype | None) -> MoE:
    gate = build_gate(
        config.gate,
        width=config.width,
        num_experts=config.num_experts,
        k=config.k,
        device=device,
        dtype=dtype,
    )
    if config.capacity is not None:
        gate = Capacity(gate, factor=config.capacity, drop=config.drop)
    kind = SwiGLU if config.experts == "swiglu" else FeedForward
    experts = kind(
        width=config.width, hidden=config.hidden, num_experts=config.num_experts, device=device, dtype=dtype
    )
    return MoE(gate=gate, experts=experts)
