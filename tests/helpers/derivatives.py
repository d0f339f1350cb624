"""Derivatives against finite differences in float64, and faults planted to show that the check can fail."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

# torch's own defaults let a gradient pass that is off by a thousandth.
_TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


def assert_derivatives(function: Callable[..., Any], *inputs: Tensor, batched: bool = True) -> None:
    """First and second derivatives are those of finite differences, one at a time and batched by vmap.

    The first ones twice: as they are, and where they are to be differentiated, which may be another code, and
    which a check of the second ones takes for granted.
    """
    gradcheck(function, inputs, check_batched_grad=batched, **_TOLERANCE)
    gradgradcheck(function, inputs, check_batched_grad=batched, **_TOLERANCE)
    found = function(*inputs)
    outputs = [out for out in ((found,) if isinstance(found, Tensor) else found) if out.requires_grad]
    cotangents = [torch.randn_like(out) for out in outputs]
    plain, differentiable = (
        torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, create_graph=again, materialize_grads=True
        )
        for again in (False, True)
    )
    torch.testing.assert_close(differentiable, plain, rtol=1e-9, atol=1e-12)


def off_by_a_factor(backward: Callable[..., Any], position: int) -> Callable[..., Any]:
    """The same backward, with the gradient at that position 0.01% too large."""

    def mutated(*args: Any) -> Any:
        gradients = list(backward(*args))
        if isinstance(gradients[position], Tensor):
            gradients[position] = gradients[position] * 1.0001
        return tuple(gradients)

    return mutated
