"""The decoder: from target tokens and the encoded source to what the softmax sees."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...moe.routing import Routing
from ..layers import Layer, LSTMState
from .attention import Attention, Memory


@dataclass(frozen=True, kw_only=True)
class DecoderState:
    """What a next step needs of those before.

    lstm: by layer name. context_B1D: of the last step, which input feeding reads.
    """

    lstm: dict[str, LSTMState]
    context_B1D: Tensor

    def select(self, row_B: Tensor) -> "DecoderState":
        """Some of the rows, in any order and any number of times. row_B: int64."""
        return DecoderState(
            lstm={name: (h[:, row_B], c[:, row_B]) for name, (h, c) in self.lstm.items()},
            context_B1D=self.context_B1D[row_B],
        )


@dataclass(frozen=True, kw_only=True)
class DecoderOutput:
    """hidden_BSD: input of the softmax. attention_BSU: weight of each source token at each step. routings: by
    layer name."""

    hidden_BSD: Tensor
    attention_BSU: Tensor
    state: DecoderState
    routings: dict[str, Routing]


class Decoder(nn.Module):
    """The first layer, attention with its output as the query, then the other layers.

    Each layer's output is added to its input, as in the language model; so is the context, and by that every
    layer above and the softmax see it.

    layers: by name, in order; the first is recurrent. reads_context: the layers whose input is the output of
    the layer before and the context, side by side. If the first is one of them, it reads the context of the
    step before, at the price of going step by step; the layers above do all steps at once either way.
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, Layer],
        reads_context: Iterable[str],
        attention: Attention,
        dropout: float,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.reads_context = frozenset(reads_context)

    def forward(
        self,
        x_BSD: Tensor,
        memory: Memory,
        state: DecoderState | None,
        mask_BS: Tensor | None,
        noise: Mapping[str, Tensor],
    ) -> DecoderOutput:
        """state: of the steps before; None for a start. mask_BS: true for real tokens. noise: by layer name,
        for gates that are to have theirs given."""
        before = {} if state is None else state.lstm
        context_B1D = torch.zeros_like(x_BSD[:, :1]) if state is None else state.context_B1D
        (first, layer), *others = self.named_layers()
        new_state: dict[str, LSTMState] = {}
        routings: dict[str, Routing] = {}
        x_BSD, context_BSD, weight_BSU, new_state[first] = self._attend(
            layer, x_BSD, memory, before.get(first), context_B1D, step_by_step=first in self.reads_context
        )
        x_BSD = x_BSD + context_BSD
        for name, layer in others:
            read_BSX = torch.cat([x_BSD, context_BSD], dim=-1) if name in self.reads_context else x_BSD
            out = layer(read_BSX, before.get(name), mask_BS, noise.get(name))
            x_BSD = x_BSD + self.dropout(out.y_BSD)
            if out.state is not None:
                new_state[name] = out.state
            if out.routing is not None:
                routings[name] = out.routing
        return DecoderOutput(
            hidden_BSD=x_BSD,
            attention_BSU=weight_BSU,
            state=DecoderState(lstm=new_state, context_B1D=context_BSD[:, -1:]),
            routings=routings,
        )

    def _attend(
        self,
        layer: Layer,
        x_BSD: Tensor,
        memory: Memory,
        lstm: LSTMState | None,
        context_B1D: Tensor,
        *,
        step_by_step: bool,
    ) -> tuple[Tensor, Tensor, Tensor, LSTMState]:
        """The first layer and attention: output, context, weights, and the state of the layer.

        All steps at once, or one after the other where each reads the context of the one before.
        """
        outputs, contexts, weights = [], [], []
        for piece_BSD in x_BSD.split(1, dim=1) if step_by_step else (x_BSD,):
            read_BSX = torch.cat([piece_BSD, context_B1D], dim=-1) if step_by_step else piece_BSD
            out = layer(read_BSX, lstm, None, None)
            assert out.state is not None
            lstm = out.state
            outputs.append(piece_BSD + self.dropout(out.y_BSD))
            context_B1D, weight_BSU = self.attention(outputs[-1], memory)
            contexts.append(context_B1D)
            weights.append(weight_BSU)
        assert lstm is not None
        return torch.cat(outputs, dim=1), torch.cat(contexts, dim=1), torch.cat(weights, dim=1), lstm

    def named_layers(self) -> Iterable[tuple[str, Layer]]:
        return cast(Iterable[tuple[str, Layer]], self.layers.items())
