"""What stands between an expert's two matrices, as kernels need it: forward, what to keep, and backward."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ActivationName = Literal["relu", "swiglu"]


class Activation(ABC):
    """An activation that maps S = `inputs` * H columns to H.

    Backward needs no more than one tensor of the size of the input, `kept`: whatever of input and output the
    activation can be recovered from.
    """

    inputs: int

    @abstractmethod
    def __call__(self, in_NS: Tensor) -> Tensor:
        """Return hidden_NH, differentiable to any order."""

    @abstractmethod
    def keep(self, in_NS: Tensor, *, out: Tensor) -> None:
        """Write into `out` [N, S] what backward needs."""

    @abstractmethod
    def hidden(self, kept_NS: Tensor) -> Tensor:
        """Return hidden_NH from what was kept."""

    @abstractmethod
    def gradient(self, grad_NH: Tensor, kept_NS: Tensor) -> Tensor:
        """Return the gradient of the input, [N, S], from that of the output."""


class ReLU(Activation):
    """max(0, x); its output tells its derivative."""

    inputs = 1

    def __call__(self, in_NS: Tensor) -> Tensor:
        return in_NS.relu()

    def keep(self, in_NS: Tensor, *, out: Tensor) -> None:
        torch.clamp_min(in_NS, 0, out=out)

    def hidden(self, kept_NS: Tensor) -> Tensor:
        return kept_NS

    def gradient(self, grad_NH: Tensor, kept_NS: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(grad_NH, kept_NS, 0)


class SwiGLU(Activation):
    """silu(a) * b, a the first half of the columns and b the second (Shazeer 2020, eq. 5)."""

    inputs = 2

    def __call__(self, in_NS: Tensor) -> Tensor:
        gate_NH, linear_NH = in_NS.chunk(2, dim=-1)
        return F.silu(gate_NH) * linear_NH

    def keep(self, in_NS: Tensor, *, out: Tensor) -> None:
        out.copy_(in_NS)

    def hidden(self, kept_NS: Tensor) -> Tensor:
        return self(kept_NS)

    def gradient(self, grad_NH: Tensor, kept_NS: Tensor) -> Tensor:
        gate_NH, linear_NH = kept_NS.chunk(2, dim=-1)
        grad_NS = torch.empty_like(kept_NS)
        grad_gate_NH, grad_linear_NH = grad_NS.chunk(2, dim=-1)
        grad_gate_NH.copy_(torch.ops.aten.silu_backward(grad_NH * linear_NH, gate_NH))
        torch.mul(grad_NH, F.silu(gate_NH), out=grad_linear_NH)
        return grad_NS


ACTIVATIONS: dict[str, Activation] = {"relu": ReLU(), "swiglu": SwiGLU()}
