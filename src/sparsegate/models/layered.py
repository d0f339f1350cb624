"""What is asked of every model, whatever its layers are and however they are joined."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..moe.kernels.sink import GradientSink
from ..moe.routing import BalanceSums
from .layers import Layer
from .softmax import Softmax


class LayeredModel(nn.Module, ABC):
    """A model of named layers before a softmax. The names key its routings, and the noise of its gates."""

    softmax: Softmax

    @abstractmethod
    def named_layers(self) -> Iterable[tuple[str, Layer]]:
        """The layers between embedding and softmax, in order."""

    def has_mixtures(self) -> bool:
        """Whether any layer routes, and so has balance losses."""
        return any(layer.routes for _, layer in self.named_layers())

    def expert_parameters(self) -> list[nn.Parameter]:
        """The weights of all layers' experts."""
        return [parameter for _, layer in self.named_layers() for parameter in layer.expert_parameters()]

    def used_experts(self, sums: Mapping[str, BalanceSums]) -> dict[Tensor, Tensor]:
        """For all experts' weights, bool [E]: which of them have a gradient, by the sums over a batch."""
        return {
            parameter: sums[name].count_E > 0
            for name, layer in self.named_layers()
            for parameter in layer.expert_parameters()
        }

    def give_expert_gradients_to(self, sink: GradientSink) -> None:
        """From now on the backward pass gives the experts' gradients away and leaves them no `.grad`."""
        for _, layer in self.named_layers():
            layer.give_expert_gradients_to(sink)

    def use_sparse_gradients(self) -> list[nn.Parameter]:
        """Leave sparse gradients to tables of which a step touches few rows, from now on; return these."""
        return []

    def after_step(self, sums: Mapping[str, BalanceSums]) -> None:
        """Tell the gates what an optimizer step was made of: sums over the whole batch, by layer name."""
        for name, layer in self.named_layers():
            if name in sums:
                layer.after_step(sums[name])

    @abstractmethod
    def sees_later_tokens(self) -> bool:
        """Whether, in the present mode, what is said of a token depends on the tokens after it."""

    def noise_widths(self) -> dict[str, int]:
        """Standard normal draws per token that each layer's gate uses in training, by layer name."""
        return {name: layer.noise_width for name, layer in self.named_layers() if layer.noise_width}

    def require_noise_names(self, noise: Mapping[str, Tensor] | None) -> None:
        """Refuse noise for a layer that takes none: the gate that it was meant for would draw its own."""
        for name in noise or {}:
            if name not in (taken := self.noise_widths()):
                names = ", ".join(taken) or "none, in this model"
                raise ValueError(f"noise: no layer {name} takes any; those that do are {names}")
