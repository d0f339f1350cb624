"""From a config to a translation model."""

from typing import Any, TypedDict

import torch

from ..holding import EVERYTHING, Holding
from ..layers import Bidirectional, Dense, Layer, Mixture, Recurrent
from ..mixture import build_mixture
from .attention import AdditiveAttention, ProductAttention
from .config import BlockConfig, DenseBlock, MixtureBlock, Translation
from .decoder import Decoder
from .encoder import Encoder
from .model import TranslationModel


class _Options(TypedDict):
    device: torch.device | str | None
    dtype: torch.dtype | None


def build_translation(
    config: Translation,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    holding: Holding = EVERYTHING,
) -> TranslationModel:
    """Build the model, freshly initialised; on the device "meta" without allocating its weights."""
    options: _Options = {"device": device, "dtype": dtype}
    attention = ProductAttention if config.attention == "product" else AdditiveAttention
    decoder_lstms = [f"lstm{index + 1}" for index in range(config.decoder_layers)]
    reads_context = decoder_lstms[:1] if config.input_feeding else decoder_lstms[1:]
    return TranslationModel(
        vocab_size=config.vocab_size,
        width=config.width,
        encoder=Encoder(layers=_encoder_layers(config, options, holding), dropout=config.dropout),
        decoder=Decoder(
            layers=_around_block(
                {
                    name: _lstm(config, options, inputs=2 if name in reads_context else 1)
                    for name in decoder_lstms
                },
                config.decoder_block,
                config.width,
                options,
                holding,
            ),
            reads_context=reads_context,
            attention=attention(width=config.width, hidden=config.attention_width, **options),
            dropout=config.dropout,
        ),
        dropout=config.dropout,
        share_embedding=config.share_embedding,
        softmax_samples=config.sampled_words,
        **options,
    )


def _encoder_layers(config: Translation, options: _Options, holding: Holding) -> dict[str, Layer]:
    num_layers = config.encoder_layers - 1 if config.bidirectional else config.encoder_layers
    lstms: dict[str, Layer] = {f"lstm{index + 1}": _lstm(config, options) for index in range(num_layers)}
    if config.bidirectional:
        lstms["lstm1"] = Bidirectional(forwards=_lstm(config, options), backwards=_lstm(config, options))
    return _around_block(lstms, config.encoder_block, config.width, options, holding)


def _around_block(
    lstms: dict[str, Any], block: BlockConfig, width: int, options: _Options, holding: Holding
) -> dict[str, Layer]:
    """The LSTMs, and the block before the last of them."""
    last = next(reversed(lstms))
    return {
        **{name: lstm for name, lstm in lstms.items() if name != last},
        **_block(block, width, options, holding),
        last: lstms[last],
    }


def _lstm(config: Translation, options: _Options, *, inputs: int = 1) -> Recurrent:
    """inputs: how many vectors of the model's width it reads side by side."""
    return Recurrent(
        width=inputs * config.width,
        units=config.lstm_units,
        projection=config.lstm_projection,
        bias=config.lstm_bias,
        **options,
    )


def _block(block: BlockConfig, width: int, options: _Options, holding: Holding) -> dict[str, Layer]:
    match block:
        case MixtureBlock():
            return {"moe": Mixture(build_mixture(block, width=width, holding=holding, **options))}
        case DenseBlock():
            return {"dense": Dense(width=width, hidden=[block.hidden], **options)}
        case _:
            return {}
