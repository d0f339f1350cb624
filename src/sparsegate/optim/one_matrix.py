"""Factored Adam's step of one matrix on the CPU, in few calls, for threads that work side by side.

Each call of torch gives up Python's lock and takes it back, for which two threads wait on each other: what
`FactoredAdam` writes in forty calls, and does for many matrices at a time, takes twenty here.
"""

import math
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from .rounding import round_at_random_

TWICE = (
    "an expert was to be updated twice in one step; call step() after each backward pass, or let gradients "
    "add up in .grad"
)


class Constants(NamedTuple):
    """Of one step. correction: 1 - beta2^step."""

    lr: float
    beta2: float
    eps: float
    correction: float


class Matrices:
    """The matrices of a parameter and their averages, one by one; all tensors are views.

    Shapes: weight [E, D, H], row [E, D], col [E, H]; last [E], int64.
    """

    def __init__(self, weight_EDH: Tensor, row_ED: Tensor, col_EH: Tensor, last_E: Tensor) -> None:
        self.address = weight_EDH.data_ptr()
        self.weight = weight_EDH.unbind()
        self.row = row_ED.unbind()
        self.col = col_EH.unbind()
        self.last = last_E.numpy()
        self._one_D, self._one_H = torch.ones_like(row_ED[0]), torch.ones_like(col_EH[0])
        self._scratch = _Scratch()

    def update(
        self, index: int, grad_DH: Tensor, step: int, constants: Constants, noise_DH: Tensor | None
    ) -> None:
        """noise_DH: with which bfloat16 weights are rounded; None: to the nearest.

        FloatingPointError: the gradient is not finite. RuntimeError: it is the second of this step. Nothing
        has changed then.
        """
        if self.last[index] == step:
            raise RuntimeError(TWICE)
        lr, beta2, eps, correction = constants
        row_D, col_H = self.row[index], self.col[index]
        scaled_DH, value_DH = self._scratch.pair(grad_DH.shape, row_D.dtype)
        if grad_DH.dtype != row_D.dtype:
            grad_DH = value_DH.copy_(grad_DH)  # squares of float16 would soon be 0 or infinite
        torch.mul(grad_DH, grad_DH, out=scaled_DH)
        decay = beta2 ** int(step - self.last[index])
        new_row_D = torch.addmv(
            row_D, scaled_DH, self._one_H, beta=decay, alpha=(1 - beta2) / grad_DH.shape[1]
        )
        mean = float(new_row_D.mean())
        if not math.isfinite(mean):
            raise FloatingPointError("the gradient of an expert's weights is not finite")
        col_H.addmv_(scaled_DH.t(), self._one_D, beta=decay, alpha=(1 - beta2) / grad_DH.shape[0])
        row_D.copy_(new_row_D)
        self.last[index] = step
        # The correction is taken out of the roots, and eps brought to their scale.
        root = correction**0.5
        by_row_D = new_row_D.sqrt_().add_(eps * root).reciprocal_()
        by_col_H = col_H.sqrt().add_(eps * root).reciprocal_()
        torch.mul(grad_DH, by_row_D[:, None], out=scaled_DH)
        factor = -lr * root * (mean**0.5 + eps * root)
        weight_DH = self.weight[index]
        if weight_DH.dtype == scaled_DH.dtype:
            weight_DH.addcmul_(scaled_DH, by_col_H, value=factor)
            return
        value_DH.copy_(weight_DH).addcmul_(scaled_DH, by_col_H, value=factor)
        if noise_DH is not None:
            round_at_random_(value_DH, noise_DH)
        weight_DH.copy_(value_DH)


class _Scratch(local):
    """Memory that each thread uses again: what it allocates and frees, the system may take and clear."""

    def __init__(self) -> None:
        self._pair = torch.empty(2, 0, device="cpu")

    def pair(self, shape_DH: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two tensors of that shape and dtype, with whatever they held last."""
        if self._pair.shape[1:] != shape_DH:
            self._pair = torch.empty(2, *shape_DH, dtype=dtype, device="cpu")
        return self._pair[0], self._pair[1]
