"""Feed-forward experts whose weights stand in two stacked tensors."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..dispatch import plan_rows
from ..kernels.activations import ACTIVATIONS, ActivationName
from ..kernels.choice import Setting, feed_forward_kernel
from ..kernels.sink import GradientSink
from ..precision import autocast_dtype, product_dtype
from ..routing import Routing
from .drawing import Normal, draw_experts
from .experts import Experts


class StackedExperts(Experts):
    """E experts act(x W_in) W_out, without biases (section 5.1: the parameter counts have no room for them).

    Parameters: w_in [E, width, S], w_out [E, hidden, width]; S is hidden times what the activation takes.

    width: of input and output. recompute: keep no hidden layer for backward but compute it again, for one
    product in six more and T * K * S values less (appendix D). kernel: one of `kernels/choice.py`; None: the
    first that suits the input. ValueError at the first input where the one named does not. storage: dtype
    that the weights are kept in where it is not that of the products, to which "threaded" casts them expert
    by expert, "triton" tile by tile if it is the narrower one, and others whole; None: `dtype`, and x must
    have it too. own: these alone out of `num_experts`, with the weights
    that they have among all; `num_experts` is then theirs. None: all.

    With a sink (`give_gradients_to`) the backward pass gives it each expert's weight gradient as soon as it
    is made, and `.grad` stays None. A sink may change that expert's weights at once.
    """

    activation: ActivationName

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        recompute: bool = False,
        kernel: str | None = None,
        storage: torch.dtype | None = None,
        own: range | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(width, hidden, num_experts) < 1:
            raise ValueError(f"width ({width}), hidden ({hidden}), num_experts ({num_experts}) must be >= 1")
        inputs = ACTIVATIONS[self.activation].inputs * hidden
        self._own, self._num_in_all = range(num_experts) if own is None else own, num_experts
        self.num_experts = num_experts = len(self._own)
        self.recompute = recompute
        self.kernel = kernel
        self.casts = storage is not None
        self.sink: GradientSink | None = None
        dtype = dtype if storage is None else storage
        self.w_in = nn.Parameter(torch.empty(num_experts, width, inputs, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width, device=device, dtype=dtype))
        self.reset_parameters()

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights."""

    def draw(self, *, std_in: float, std_out: float) -> None:
        """Fill the weights with normal numbers of these deviations; see `draw_experts`."""
        draw_experts(
            [Normal(stack=self.w_in, std=std_in), Normal(stack=self.w_out, std=std_out)], own=self._own
        )

    def extra_repr(self) -> str:
        num_experts, hidden, width = self.w_out.shape
        return f"width={width}, hidden={hidden}, num_experts={num_experts}"

    def give_gradients_to(self, sink: GradientSink | None) -> None:
        self.sink = sink

    def ops_per_pair(self) -> int:
        return self.w_in[0].numel() + self.w_out[0].numel()

    def part(self, first: int, end: int) -> "StackedExperts":
        _, hidden, width = self.w_out.shape
        part = type(self)(
            width=width,
            hidden=hidden,
            num_experts=self._num_in_all,
            recompute=self.recompute,
            kernel=self.kernel,
            storage=self.w_in.dtype if self.casts else None,
            own=self._own[first:end],
            device="meta",
        )
        for name, whole in self.named_parameters():
            rows = whole.detach()[first:end].clone()
            part.register_parameter(name, nn.Parameter(rows, requires_grad=whole.requires_grad))
        return part.train(self.training)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        dtype = autocast_dtype(x_TD) if self.casts else product_dtype(x_TD, self.w_in, self.w_out)
        setting = Setting(
            device=x_TD.device.type,
            dtype=dtype,
            num_experts=self.num_experts,
            width=self.w_out.shape[2],
            hidden=self.w_out.shape[1],
        )
        return feed_forward_kernel(self.kernel, setting)(
            x_TD,
            self.w_in,
            self.w_out,
            routing.weight_N,
            plan_rows(routing),
            activation=self.activation,
            recompute=self.recompute,
            dtype=dtype,
            sink=self.sink,
        )
