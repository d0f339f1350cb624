"""Backward passes that are to be differentiated themselves, by way of operators that can be."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def gradients_through(
    function: Callable[..., Iterable[Tensor | None]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Iterable[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that need one, as differentiable as the function; None for the others.

    grads: of the function's outputs, None for those that nothing depends on.
    """
    # One input may be made from another, as a gate's weights are from x. What autograd says of x itself would
    # include the way through the weights, and the weights' own gradient takes it once more; so others of the
    # same values stand for all of them.
    stand_ins = [tensor.view_as(tensor) for tensor in inputs]
    outputs = [
        (value, grad)
        for value, grad in zip(function(*stand_ins), grads, strict=True)
        if value is not None and grad is not None
    ]
    found = iter(
        torch.autograd.grad(
            [value for value, _ in outputs],
            [tensor for tensor, needed in zip(stand_ins, needs, strict=True) if needed],
            [grad for _, grad in outputs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(found) if needed else None for needed in needs)
