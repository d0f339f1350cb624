"""Adam for tables of which a step touches few rows: embeddings, the weights of a sampled softmax."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .loading import load_as_stored


class RowAdam(torch.optim.Optimizer):
    """Adam for each row by itself: its steps are those in which it has a gradient, and no others concern it.

    So the first gradient of a rare word moves it by the step size, however late it comes, and a step costs
    what the rows of its batch cost. (Adam would move the row on at steps without it, by what is left of its
    first moment; SparseAdam corrects a late row's moments as if they had been averaged from the start.) The
    second moment is one number for each row, the average of its squared gradient's mean.

    State of a table [V, D]: first [V, D], in the table's dtype, absent where beta1 is 0; second [V], float32;
    count [V], int32, of a row's steps. In bytes for float32, 4 V D + 8 V, or 8 V.

    params: tables whose gradients are sparse (COO, over rows). lr: step size. beta1, beta2: decay of the
    moments. eps: added to the root of the second.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr ({lr}) must not be negative")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} ({beta}) must be at least 0 and below 1")
        if not eps > 0:
            raise ValueError(f"eps ({eps}) must be above 0")
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore
        """Update the rows that have a gradient. ValueError: a gradient that is not sparse."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    if table.grad.layout != torch.sparse_coo:
                        raise ValueError(
                            f"params: the gradient of a table of shape {[*table.shape]} is "
                            f"{table.grad.layout}; make it sparse, or give the table to another optimizer"
                        )
                    gradient = table.grad.coalesce()
                    self._update(table, gradient.indices()[0], gradient.values(), group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but for dtypes: torch casts what it loads to that of the tables."""
        super().load_state_dict(state_dict)
        load_as_stored(self, state_dict, on_cpu=())

    def _update(self, table_VD: Tensor, row_N: Tensor, grad_ND: Tensor, group: dict[str, Any]) -> None:
        """row_N: each once."""
        state, beta1, beta2 = self.state[table_VD], group["beta1"], group["beta2"]
        if not state:
            num_rows = len(table_VD)
            if beta1:
                state["first"] = torch.zeros_like(table_VD)
            state["second"] = table_VD.new_zeros(num_rows, dtype=torch.float32)
            state["count"] = table_VD.new_zeros(num_rows, dtype=torch.int32)
        count_N = state["count"][row_N] + 1
        state["count"][row_N] = count_N
        second_N = state["second"][row_N].lerp(grad_ND.float().square().mean(dim=1), 1 - beta2)
        state["second"][row_N] = second_N
        root_N1 = (second_N / (1 - beta2 ** count_N.double())).float().sqrt_().add_(group["eps"])[:, None]
        mean_ND = grad_ND
        if beta1:
            mean_ND = state["first"].index_select(0, row_N).lerp_(grad_ND, 1 - beta1)
            state["first"].index_copy_(0, row_N, mean_ND)
        correction_N1 = (1 - beta1 ** count_N.double()).to(grad_ND.dtype)[:, None]
        table_VD.index_add_(
            0, row_N, mean_ND / (root_N1 * correction_N1).to(grad_ND.dtype), alpha=-group["lr"]
        )
