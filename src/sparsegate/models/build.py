"""From a config to a model."""

from typing import overload

import torch

from .config import FeedForwardLM, LanguageModelConfig, MixtureLM
from .holding import EVERYTHING, Holding
from .language_model import LanguageModel
from .layers import Dense, Layer, Mixture, Recurrent
from .mixture import build_mixture
from .softmax import require_cutoffs
from .translation.build import build_translation
from .translation.config import Translation
from .translation.model import TranslationModel

ModelConfig = LanguageModelConfig | Translation


@overload
def build(
    config: LanguageModelConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    holding: Holding = EVERYTHING,
) -> LanguageModel: ...
@overload
def build(
    config: Translation,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    holding: Holding = EVERYTHING,
) -> TranslationModel: ...
def build(
    config: ModelConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    holding: Holding = EVERYTHING,
) -> LanguageModel | TranslationModel:
    """Build the model, freshly initialised; on the device "meta" without allocating its weights.

    holding: what of it is made here. From one state of the generator, every part is what it is in the whole.
    """
    match config:
        case Translation():
            return build_translation(config, device=device, dtype=dtype, holding=holding)
        case _:
            return _language_model(config, device=device, dtype=dtype, holding=holding)


def _language_model(
    config: LanguageModelConfig,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    holding: Holding,
) -> LanguageModel:

    def recurrent() -> Recurrent:
        return Recurrent(
            width=config.width,
            units=config.lstm_units,
            projection=config.lstm_projection,
            bias=config.lstm_bias,
            device=device,
            dtype=dtype,
        )

    if cutoffs := config.softmax_cutoffs:
        # Not by the configuration itself, whose vocabulary is the dataset's only when training starts.
        require_cutoffs(
            cutoffs, vocab_size=config.vocab_size, width=config.width, name="model.softmax-cutoffs"
        )
    layers: dict[str, Layer]
    match config:
        case MixtureLM():
            moe = build_mixture(config, width=config.width, device=device, dtype=dtype, holding=holding)
            layers = {"lstm1": recurrent(), "moe": Mixture(moe), "lstm2": recurrent()}
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
        softmax_samples=config.sampled_words,
        softmax_cutoffs=cutoffs,
        holding=holding,
        device=device,
        dtype=dtype,
    )
