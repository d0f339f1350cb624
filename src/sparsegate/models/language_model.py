"""The language model: embedding, residual layers, softmax (section 5.1 and appendix C of the paper)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..moe.routing import Routing
from .holding import EVERYTHING, Holding, TableOptions
from .layered import LayeredModel
from .layers import Layer, LSTMState
from .softmax import Softmax

State = dict[str, LSTMState]

# The paper does not say. Of 1, 0.3 and 0.1 the middle one trained best at width 128.
EMBEDDING_STD = 0.3


@dataclass(frozen=True, kw_only=True)
class LanguageModelOutput:
    """hidden_BSD: input of the softmax. state, routings: by layer name, for the layers that have one."""

    hidden_BSD: Tensor
    state: State
    routings: dict[str, Routing]


class LanguageModel(LayeredModel):
    """x_0 = dropout(embedding), x_i = x_{i-1} + dropout(layer_i(x_{i-1})), softmax of the last.

    Every layer except the softmax has dropout on its output, and then the output of the layer before is added
    (appendix C.1). The embedding and the softmax are separate tables.

    layers: by name, in order; the names stand in checkpoints and key the states and routings.
    softmax_samples: words that a step of training tells targets from; 0: all. softmax_cutoffs: of an adaptive
    softmax, which has no samples; none: a full one. holding: what is made here.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: Mapping[str, Layer],
        dropout: float,
        softmax_samples: int = 0,
        softmax_cutoffs: Sequence[int] = (),
        holding: Holding = EVERYTHING,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        tables = TableOptions(vocab_size=vocab_size, width=width, device=device, dtype=dtype)
        self.embedding = holding.embedding(tables, std=EMBEDDING_STD)
        self.layers = nn.ModuleDict(layers)
        self.dropout = nn.Dropout(dropout)
        self.softmax: Softmax = holding.softmax(tables, num_samples=softmax_samples, cutoffs=softmax_cutoffs)

    def forward(
        self,
        input_BS: Tensor,
        *,
        state: State | None = None,
        mask_BS: Tensor | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> LanguageModelOutput:
        """Hidden layer from which `softmax` predicts the token after each input token.

        input_BS: int64 token ids. state: carried from the call on the tokens before (None: a start). mask_BS:
        bool, true for real tokens. noise: by layer name, [B, S, noise_width] standard normal; the gates draw
        their own where it is None.

        Raises:
            ValueError: noise has a name not in `noise_widths`.
        """
        self.require_noise_names(noise)
        x_BSD = self.dropout(self.embedding(input_BS))
        new_state: State = {}
        routings: dict[str, Routing] = {}
        for name, layer in self.named_layers():
            out = layer(x_BSD, (state or {}).get(name), mask_BS, (noise or {}).get(name))
            x_BSD = x_BSD + self.dropout(out.y_BSD)
            if out.state is not None:
                new_state[name] = out.state
            if out.routing is not None:
                routings[name] = out.routing
        return LanguageModelOutput(hidden_BSD=x_BSD, state=new_state, routings=routings)

    def named_layers(self) -> Iterable[tuple[str, Layer]]:
        return cast(Iterable[tuple[str, Layer]], self.layers.items())

    def use_sparse_gradients(self) -> list[nn.Parameter]:
        """The embedding, and the softmax's weights where a step sees a sample of the words."""
        self.embedding.sparse = True
        return [*self.embedding.parameters(), *self.softmax.use_sparse_gradients()]

    def sees_later_tokens(self) -> bool:
        return any(layer.sees_later_tokens for _, layer in self.named_layers())

    def ops_per_token(self) -> int:
        """Multiply-adds per token without the softmax: the "ops/timestep" of the paper's tables 7 and 8."""
        return sum(layer.ops_per_token() for _, layer in self.named_layers())
