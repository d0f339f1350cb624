"""The translation model: embedding, encoder, attention, decoder, softmax (appendix E of the paper)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...moe.routing import Routing
from ..language_model import EMBEDDING_STD
from ..layered import LayeredModel
from ..layers import Layer
from ..softmax import OutputSoftmax
from .attention import Memory
from .decoder import Decoder, DecoderOutput, DecoderState
from .encoder import Encoder

ENCODER, DECODER = "encoder.", "decoder."

Noise = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TranslationOutput:
    """hidden_BSD: input of the softmax, which predicts the label of each step of the target.

    attention_BSU: weight of each source token at each step, float32 at least. routings: by layer name,
    `encoder.moe` and `decoder.moe` where there are mixtures.
    """

    hidden_BSD: Tensor
    attention_BSU: Tensor
    routings: dict[str, Routing]


class TranslationModel(LayeredModel):
    """From source tokens and the target tokens so far to the next target token.

    Embedding, LSTM and mixture layers have dropout on their outputs, and then the output of the layer before
    is added. Source and target have one vocabulary.

    share_embedding: one embedding table for both; else two, as in the paper.
    """

    softmax: OutputSoftmax  # pyrefly: ignore

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        encoder: Encoder,
        decoder: Decoder,
        dropout: float,
        share_embedding: bool,
        softmax_samples: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._source, self._target = ("shared", "shared") if share_embedding else ("source", "target")
        self.embedding = nn.ModuleDict(
            {
                name: nn.Embedding(vocab_size, width, device=device, dtype=dtype)
                for name in dict.fromkeys((self._source, self._target))
            }
        )
        for table in self.embedding.parameters():
            nn.init.normal_(table, std=EMBEDDING_STD)
        self.encoder = encoder
        self.decoder = decoder
        self.dropout = nn.Dropout(dropout)
        self.softmax = OutputSoftmax(
            vocab_size=vocab_size, width=width, num_samples=softmax_samples, device=device, dtype=dtype
        )

    def forward(
        self,
        *,
        source_BS: Tensor,
        source_mask_BS: Tensor,
        target_BS: Tensor,
        target_mask_BS: Tensor,
        noise: Noise | None = None,
    ) -> TranslationOutput:
        """Hidden layer from which `softmax` predicts the label of each target token: the token after it.

        source_BS, target_BS: int64 token ids, each with as many steps as its longest sentence; a target
        begins with the beginning-of-sentence id. Masks: bool, true for real tokens, which come first in each
        row; what stands in the padding has no influence. noise: standard normal, [B, steps, noise_width] by
        layer name; the gates draw their own where it is None.

        Raises:
            ValueError: sources and targets are not equally many, or noise has a name not in `noise_widths`.
        """
        if len(source_BS) != len(target_BS):
            raise ValueError(
                f"source_BS ({len(source_BS)} rows) and target_BS ({len(target_BS)}) must pair up"
            )
        memory, routings = self.encode(source_BS, source_mask_BS, noise=noise)
        out = self.decode(target_BS, memory, mask_BS=target_mask_BS, noise=noise)
        return TranslationOutput(
            hidden_BSD=out.hidden_BSD, attention_BSU=out.attention_BSU, routings=routings | out.routings
        )

    def encode(
        self, source_BS: Tensor, mask_BS: Tensor, *, noise: Noise | None = None
    ) -> tuple[Memory, dict[str, Routing]]:
        """What the decoder sees of the sources, and routings. A source may be empty, not all columns."""
        self.require_noise_names(noise)
        if source_BS.shape[1] == 0:
            raise ValueError("source_BS has no columns; pad empty sources to one masked token")
        x_BUD = self.dropout(self.embedding[self._source](source_BS))
        x_BUD, routings = self.encoder(x_BUD, mask_BS, _inner(noise, ENCODER))
        return self.decoder.attention.remember(x_BUD, mask_BS), _outer(routings, ENCODER)

    def decode(
        self,
        target_BS: Tensor,
        memory: Memory,
        *,
        state: DecoderState | None = None,
        mask_BS: Tensor | None = None,
        noise: Noise | None = None,
    ) -> DecoderOutput:
        """One or more steps of the decoder, from `state`, or from the start where it is None.

        target_BS: int64. It may have a multiple of the memory's rows: then as many consecutive rows belong to
        each sentence. mask_BS: None where all tokens are real.
        """
        self.require_noise_names(noise)
        x_BSD = self.dropout(self.embedding[self._target](target_BS))
        out = self.decoder(x_BSD, memory, state, mask_BS, _inner(noise, DECODER))
        return DecoderOutput(
            hidden_BSD=out.hidden_BSD,
            attention_BSU=out.attention_BSU,
            state=out.state,
            routings=_outer(out.routings, DECODER),
        )

    def named_layers(self) -> Iterable[tuple[str, Layer]]:
        for prefix, part in ((ENCODER, self.encoder), (DECODER, self.decoder)):
            for name, layer in part.named_layers():
                yield prefix + name, layer

    def sees_later_tokens(self) -> bool:
        """Of the target: the source is there as a whole."""
        return any(layer.sees_later_tokens for _, layer in self.decoder.named_layers())

    def selects_over_batch(self) -> list[str]:
        """The layers in which, in the present mode, a sentence's experts depend on the other sentences."""
        return [name for name, layer in self.named_layers() if layer.selects_over_batch]

    def ops_per_token(self) -> int:
        """Multiply-adds per source and target token as in the paper's tables 2 to 5.

        They are those of all LSTMs, experts and dense blocks, and of the softmax. Gates and attention are not
        in them: `gate_and_attention_ops_per_token`.
        """
        layers = (layer.ops_per_token() - layer.gate_ops_per_token() for _, layer in self.named_layers())
        return sum(layers) + self.softmax.ops_per_token()

    def gate_and_attention_ops_per_token(self) -> int:
        """What the paper's count leaves out, except for the products for each pair of tokens."""
        gates = sum(layer.gate_ops_per_token() for _, layer in self.named_layers())
        return gates + sum(self.decoder.attention.ops_per_token())


def _inner(noise: Noise | None, prefix: str) -> dict[str, Tensor]:
    """Of values by layer name those of one part, by the names that it knows."""
    return {
        name.removeprefix(prefix): value for name, value in (noise or {}).items() if name.startswith(prefix)
    }


def _outer(routings: Mapping[str, Routing], prefix: str) -> dict[str, Routing]:
    return {prefix + name: routing for name, routing in routings.items()}
