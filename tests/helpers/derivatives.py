"""Derivatives against finite differences in float64, and faults planted to show that the check can fail."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

# torch's own defaults let a gradient pass that is off by a thousandth.
_TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


def assert_derivatives(function: Callable[..., Any], *inputs: Tensor, batched: bool = True) -> None:
    """First and second derivatives are those of finite differences, one at a time and batched by vmap."""
    gradcheck(function, inputs, check_batched_grad=batched, **_TOLERANCE)
    gradgradcheck(function, inputs, check_batched_grad=batched, **_TOLERANCE)


def off_by_a_factor(backward: Callable[..., Any], position: int) -> Callable[..., Any]:
    """The same backward, with the gradient at that position 0.01% too large."""

    def mutated(*args: Any) -> Any:
        gradients = list(backward(*args))
        if isinstance(gradients[position], Tensor):
            gradients[position] = gradients[position] * 1.0001
        return tuple(gradients)

    return mutated
