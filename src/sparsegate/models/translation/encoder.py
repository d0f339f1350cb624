"""The encoder: from source tokens to what attention looks at."""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from ...moe.routing import Routing
from ..layers import Layer


class Encoder(nn.Module):
    """x_i = x_{i-1} + dropout(layer_i(x_{i-1})), as in the language model; layers may see the whole row.

    layers: by name, in order.
    """

    def __init__(self, *, layers: Mapping[str, Layer], dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BUD: Tensor, mask_BU: Tensor, noise: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Routing]]:
        """The last layer's output, and routings by layer name. mask_BU: true for real tokens, which come
        first in each row. noise: by layer name, for gates that are to have theirs given."""
        routings: dict[str, Routing] = {}
        for name, layer in self.named_layers():
            out = layer(x_BUD, None, mask_BU, noise.get(name))
            x_BUD = x_BUD + self.dropout(out.y_BSD)
            if out.routing is not None:
                routings[name] = out.routing
        return x_BUD, routings

    def named_layers(self) -> Iterable[tuple[str, Layer]]:
        return cast(Iterable[tuple[str, Layer]], self.layers.items())
