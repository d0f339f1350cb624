"""The gradients that a backward pass has left."""

from torch import Tensor, nn


def gradients_of(model: nn.Module) -> list[Tensor]:
    """All there are; of sparse ones the values, each row once."""
    found = []
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            found.append(parameter.grad.values())
        elif parameter.grad is not None:
            found.append(parameter.grad)
    return found
