"""The layers that a language model is stacked from; one interface for recurrent, dense and sparse ones."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.kernels.sink import GradientSink
from ..moe.layer import MoE
from ..moe.precision import autocast_off
from ..moe.routing import BalanceSums, Routing

LSTMState = tuple[Tensor, Tensor]

_CPU_HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True, kw_only=True)
class LayerOutput:
    """y_BSD: the output. state: what a recurrent layer carries on. routing: what a sparse layer decided."""

    y_BSD: Tensor
    state: LSTMState | None = None
    routing: Routing | None = None


class Layer(nn.Module, ABC):
    """Maps [B, S, width] to [B, S, width].

    routes: whether its output has a routing. noise_width: standard normal draws per token, mostly 0.
    """

    routes: bool = False
    noise_width: int = 0

    @abstractmethod
    def forward(
        self, x_BSD: Tensor, state: LSTMState | None, mask_BS: Tensor | None, noise: Tensor | None
    ) -> LayerOutput:
        """state: carried from the tokens before, None for a start. mask_BS: true for real tokens."""

    @abstractmethod
    def ops_per_token(self) -> int:
        """Multiply-adds per token in the forward pass: the paper's metric."""

    def expert_parameters(self) -> Iterable[nn.Parameter]:
        """The weights of experts, stacked: of most models the largest part."""
        return ()

    def give_expert_gradients_to(self, sink: GradientSink) -> None:
        """From now on the backward pass gives the experts' gradients away and leaves them no `.grad`."""

    def after_step(self, sums: BalanceSums) -> None:
        """Called after each optimizer step with what the layer's routing added up to over the batch."""

    @property
    def sees_later_tokens(self) -> bool:
        """Whether, in the present mode, what becomes of a token depends on tokens after it."""
        return False

    @property
    def selects_over_batch(self) -> bool:
        """Whether, in the present mode, what becomes of a row depends on the batch's other rows."""
        return False

    def gate_ops_per_token(self) -> int:
        """Of `ops_per_token`, those that decide which experts compute."""
        return 0


class Recurrent(Layer):
    """An LSTM; where `projection` is not 0, its projected output feeds the next step (Sak et al. 2014).

    torch has no projection to as many values as there are units. That one stands after the LSTM here, and the
    units themselves feed the next step: with square matrices W (P h) and (W P) h are the same recurrences,
    and parameters and multiply-adds are as many.
    """

    def __init__(
        self,
        *,
        width: int,
        units: int,
        projection: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        square = projection == units
        self.lstm = nn.LSTM(
            width,
            units,
            bias=bias,
            proj_size=0 if square else projection,
            batch_first=True,
            device=device,
            dtype=dtype,
        )
        self.project = (
            nn.Linear(units, units, bias=False, device=device, dtype=dtype) if square else nn.Identity()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(units) as torch does; biases, where there are any, 0 and 1 (forget gates)."""
        self.lstm.reset_parameters()
        units = self.lstm.hidden_size
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("bias"):
                    parameter.zero_()
                if name.startswith("bias_ih"):
                    parameter[units : 2 * units] = 1.0
            for parameter in self.project.parameters():
                nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)

    def forward(
        self, x_BSD: Tensor, state: LSTMState | None, mask_BS: Tensor | None, noise: Tensor | None
    ) -> LayerOutput:
        with warnings.catch_warnings():
            # What torch says of a projected LSTM on CPU: that it computes it as it always has.
            warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
            y_BSD, state = self._read(x_BSD, state)
        return LayerOutput(y_BSD=self.project(y_BSD), state=state)

    def _read(self, x_BSD: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        """In float32 where the processor has no bfloat16: there torch's LSTM fails under autocast."""
        if _CPU_HAS_BFLOAT16 or x_BSD.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.lstm(x_BSD, state)
        with autocast_off(x_BSD.device):
            return self.lstm(x_BSD.float(), None if state is None else (state[0].float(), state[1].float()))

    def ops_per_token(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.dim() == 2)


class Bidirectional(Layer):
    """The sum of one LSTM that reads forwards and one that reads each row backwards from its last token.

    A sum keeps the width. Its mask must be true on a first part of each row and false on the rest; the
    reader that goes backwards meets the padding last. It carries no state: it needs the whole row.
    """

    def __init__(self, *, forwards: Recurrent, backwards: Recurrent) -> None:
        super().__init__()
        self.forwards = forwards
        self.backwards = backwards

    def forward(
        self, x_BSD: Tensor, state: LSTMState | None, mask_BS: Tensor | None, noise: Tensor | None
    ) -> LayerOutput:
        assert state is None
        forwards = self.forwards(x_BSD, None, mask_BS, None)
        backwards = self.backwards(reversed_rows(x_BSD, mask_BS), None, mask_BS, None)
        return LayerOutput(y_BSD=forwards.y_BSD + reversed_rows(backwards.y_BSD, mask_BS))

    def ops_per_token(self) -> int:
        return self.forwards.ops_per_token() + self.backwards.ops_per_token()

    @property
    def sees_later_tokens(self) -> bool:
        return True


def reversed_rows(x_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """The real tokens of each row in reverse order; padding, after them, where it was."""
    if mask_BS is None:
        return x_BSD.flip(1)
    step_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    index_BS = (mask_BS.sum(dim=1, keepdim=True) - 1 - step_S).where(mask_BS, step_S)
    return x_BSD.gather(1, index_BS[:, :, None].expand_as(x_BSD))


class Mixture(Layer):
    """sigmoid(MoE(x)) (appendix C.1), applied to all time steps at once (section 3.1, "convolutionality")."""

    routes = True

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.noise_width = moe.gate.noise_width

    def forward(
        self, x_BSD: Tensor, state: LSTMState | None, mask_BS: Tensor | None, noise: Tensor | None
    ) -> LayerOutput:
        y_BSD, routing = self.moe(x_BSD, mask_BS, noise)
        return LayerOutput(y_BSD=y_BSD.sigmoid(), routing=routing)

    def ops_per_token(self) -> int:
        return self.moe.ops_per_token()

    def expert_parameters(self) -> Iterable[nn.Parameter]:
        return self.moe.experts.parameters()

    def give_expert_gradients_to(self, sink: GradientSink) -> None:
        self.moe.experts.give_gradients_to(sink)

    def after_step(self, sums: BalanceSums) -> None:
        self.moe.gate.after_step(sums)

    @property
    def sees_later_tokens(self) -> bool:
        return self.moe.gate.sees_later_tokens

    @property
    def selects_over_batch(self) -> bool:
        return self.moe.gate.selects_over_batch

    def gate_ops_per_token(self) -> int:
        return self.moe.gate.ops_per_token()


class Dense(Layer):
    """sigmoid(FF(x)), FF a stack of ReLU layers without biases: a mixture's single expert, always active."""

    def __init__(
        self,
        *,
        width: int,
        hidden: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = [width, *hidden, width]
        self.weights = nn.ParameterList(
            torch.empty(outputs, inputs, device=device, dtype=dtype) for inputs, outputs in pairwise(widths)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the experts': normal, variance 2/fan_in before a ReLU and 1/fan_in for the last layer."""
        *before_relu, last = self.weights
        for weight in before_relu:
            nn.init.normal_(weight, std=(2 / weight.shape[1]) ** 0.5)
        nn.init.normal_(last, std=last.shape[1] ** -0.5)

    def forward(
        self, x_BSD: Tensor, state: LSTMState | None, mask_BS: Tensor | None, noise: Tensor | None
    ) -> LayerOutput:
        *before_relu, last = self.weights
        y = x_BSD
        for weight in before_relu:
            y = F.linear(y, weight).relu()
        return LayerOutput(y_BSD=F.linear(y, last).sigmoid())

    def ops_per_token(self) -> int:
        return sum(weight.numel() for weight in self.weights)
