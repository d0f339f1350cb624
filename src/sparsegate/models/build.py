"""From a config to a model."""

import torch

from .config import FeedForwardLM, LanguageModelConfig, MixtureLM
from .language_model import LanguageModel
from .layers import Dense, Layer, Mixture, Recurrent
from .mixture import build_mixture


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
            mixture = Mixture(build_mixture(config, width=config.width, device=device, dtype=dtype))
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
