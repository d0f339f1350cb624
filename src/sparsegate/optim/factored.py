"""Adam for expert weights, at hardly any memory (appendix D of the paper)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Experts are updated together up to this many numbers, so that no temporary is larger.
_CHUNK = 1 << 22


class FactoredAdam(torch.optim.Optimizer):
    """Adam without a first moment, whose second moment is kept as its row and column averages.

    The second moment V of a matrix is a moving average of its squared gradient. Instead of V there are its
    averages over each row, R, and over each column, C, and "the matrix of estimators is taken to be the outer
    product of those two vectors divided by the mean of either one": R C^T / mean(R), which is V where V has
    rank one. Both are corrected for their start at zero as Adam's are; the paper states no constants. Every
    matrix, the last two axes of a parameter, is one by itself: each expert of a stack has its own averages.

    State of a parameter [..., D, H]: row [..., D] and col [..., H], float32, and step: 1/H + 1/D of its size.
    A matrix without a gradient at a step (an expert without tokens) keeps its weights, and its averages
    decay.

    params: tensors of two axes or more, or groups of them. lr: step size. beta2: decay of the averages.
    eps: added to the root of each average, for a matrix that never had a gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr ({lr}) must not be negative")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 ({beta2}) must be at least 0 and below 1")
        if not eps > 0:
            raise ValueError(f"eps ({eps}) must be above 0")
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() < 2:
                    raise ValueError(
                        f"params: one has the shape {[*parameter.shape]}, and rows and columns need two "
                        "axes; give it to another optimizer"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["row"] = parameter.new_zeros(parameter.shape[:-1], dtype=torch.float32)
            state["col"] = parameter.new_zeros(
                *parameter.shape[:-2], parameter.shape[-1], dtype=torch.float32
            )
            state["step"] = torch.zeros(())
        state["step"] += 1
        row, col = state["row"], state["col"]
        row.lerp_(_mean_square(grad, dim=-1), 1 - group["beta2"])
        col.lerp_(_mean_square(grad, dim=-2), 1 - group["beta2"])
        correction = 1 - group["beta2"] ** float(state["step"])
        root_row = (row / correction).sqrt_().add_(group["eps"])
        root_col = (col / correction).sqrt_().add_(group["eps"])
        # g / sqrt(R C^T / mean(R)) without the matrix: one factor for each row, and one for each column.
        root_mean = (row.mean(dim=-1, keepdim=True) / correction).sqrt_().add_(group["eps"])
        _descend(
            parameter.view(-1, *parameter.shape[-2:]),
            grad.reshape(-1, *grad.shape[-2:]),
            by_row=(root_mean / root_row).view(-1, grad.shape[-2], 1),
            by_col=(group["lr"] / root_col).view(-1, 1, grad.shape[-1]),
        )


def _descend(weight_EDH: Tensor, grad_EDH: Tensor, *, by_row: Tensor, by_col: Tensor) -> None:
    """weight -= grad * by_row * by_col, some matrices at a time. by_row: [E, D, 1]. by_col: [E, 1, H]."""
    together = max(1, _CHUNK // max(weight_EDH[0].numel(), 1))
    for weight, grad, rows, cols in zip(
        *(tensor.split(together) for tensor in (weight_EDH, grad_EDH, by_row, by_col)), strict=True
    ):
        weight.sub_((grad * rows).mul_(cols).to(weight.dtype))


def _mean_square(grad: Tensor, *, dim: int) -> Tensor:
    """Mean of the squares along an axis, float32, without a matrix of squares."""
    norm = torch.linalg.vector_norm(grad, dim=dim, dtype=torch.float32)
    return norm.square_() / grad.shape[dim]
