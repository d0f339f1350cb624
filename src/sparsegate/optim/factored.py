"""Adam for expert weights, at hardly any memory (appendix D of the paper)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .loading import load_as_stored
from .one_matrix import TWICE, Constants, Matrices
from .rounding import RoundingNoise, round_at_random_

# Matrices are updated together up to this many numbers, so that no temporary is larger.
_CHUNK = 1 << 22
# State that stays there wherever the parameters are.
ON_CPU = ("last", "step")


class FactoredAdam(torch.optim.Optimizer):
    """Adam without a first moment, whose second moment is kept as its row and column averages.

    The second moment V of a matrix is a moving average of its squared gradient. Instead of V there are its
    averages over each row, R, and over each column, C, and "the matrix of estimators is taken to be the outer
    product of those two vectors divided by the mean of either one": R C^T / mean(R), which is V where V has
    rank one. Both are corrected for their start at zero as Adam's are; the paper states no constants. Every
    matrix, the last two axes of a parameter, is one by itself: each expert of a stack has its own averages.

    State of a parameter [..., D, H]: row [..., D] and col [..., H], float32 (float64 for float64 weights);
    last [...], int64, the step at which a matrix was last updated, and step, both on the CPU. In bytes,
    4 (D + H) + 8 for each matrix. A matrix without a gradient at a step (an expert without tokens) keeps its
    weights, and its averages decay: at once with a gradient of zeros, at its next update if it is left out.

    Gradients come from `.grad` with `step()`, or matrix by matrix through `consume`, which updates them at
    once; `step()` then ends the step. Both give equal weights.

    params: tensors of two axes or more, or groups of them. lr: step size. beta2: decay of the averages.
    eps: added to the root of each average, for a matrix that never had a gradient. rounding_seed: bfloat16
    weights are rounded up or down at random, their mean the unrounded value, by draws that follow from this
    seed and the step; None: to the nearest.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        rounding_seed: int | None = None,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr ({lr}) must not be negative")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 ({beta2}) must be at least 0 and below 1")
        if not eps > 0:
            raise ValueError(f"eps ({eps}) must be above 0")
        if rounding_seed is not None and rounding_seed < 0:
            raise ValueError(f"rounding_seed ({rounding_seed}) must not be negative")
        self._noise = None if rounding_seed is None else RoundingNoise(rounding_seed)
        self._matrices: dict[Tensor, tuple[Tensor, Matrices]] = {}
        self._begun: set[Tensor] = set()
        self._used: Mapping[Tensor, Tensor] = {}
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Also makes the state, which is then there whichever thread is the first to update."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2:
                raise ValueError(
                    f"params: one has the shape {[*parameter.shape]}, and rows and columns need two "
                    "axes; give it to another optimizer"
                )
            *leading, num_rows, num_columns = parameter.shape
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self.state[parameter] = {
                "row": parameter.new_zeros(*leading, num_rows, dtype=wide),
                "col": parameter.new_zeros(*leading, num_columns, dtype=wide),
                "last": torch.zeros(leading, dtype=torch.int64, device="cpu"),
                "step": torch.zeros((), device="cpu"),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore
        """Update every parameter that has a gradient; end the step of those that were updated in backward."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is not None:
                used_E = self._used.get(parameter)
                grad_EDH = parameter.grad.reshape(-1, *parameter.shape[-2:])
                for block in _blocks(grad_EDH, used_E):
                    self._update(parameter, block, grad_EDH[block], _squares(grad_EDH[block]))
            elif parameter not in self._begun:
                continue
            self.state[parameter]["step"] += 1
        self._begun.clear()
        self._used = {}
        return loss

    def only(self, used: Mapping[Tensor, Tensor]) -> None:
        """Tell which matrices the gradients of the next step are of; those of the others are zeros.

        used: for some parameters, bool [...]. What is left out costs nothing: it is not even read.
        """
        self._used = used

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_noise": self._noise}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, and of what is loaded: no step has begun in either."""
        self._matrices, self._begun, self._used = {}, set(), {}
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but for dtypes: torch casts what it loads to that of the weights."""
        super().load_state_dict(state_dict)
        load_as_stored(self, state_dict, on_cpu=ON_CPU)

    @property
    def has_begun(self) -> bool:
        """Whether weights have been updated since the last `step()`: there is then no way back."""
        return bool(self._begun)

    @torch.no_grad()
    def consume(self, weight_EDH: Tensor, first_expert: int, grad_EDH: Tensor) -> None:
        """Update some matrices with their gradient, for the step that `step()` will end; any thread may.

        weight_EDH: the parameter. grad_EDH: of matrices from first_expert on. FloatingPointError: it is not
        finite. RuntimeError: one of them has had its update of this step. They are then as they were.
        """
        self._begun.add(weight_EDH)
        if weight_EDH.device.type == "cpu" and len(grad_EDH) == 1:
            self._update_one(weight_EDH, first_expert, grad_EDH[0])
            return
        state, block = self.state[weight_EDH], slice(first_expert, first_expert + len(grad_EDH))
        if (state["last"].view(-1)[block] > state["step"]).any():
            raise RuntimeError(TWICE)
        squares_EDH = _squares(grad_EDH)
        if not squares_EDH.sum().isfinite():
            raise FloatingPointError("the gradient of experts' weights is not finite")
        self._update(weight_EDH, block, grad_EDH, squares_EDH)

    def _update(self, parameter: Tensor, block: slice, grad_EDH: Tensor, squares_EDH: Tensor) -> None:
        """One step of some matrices. squares_EDH: is overwritten."""
        group, state = self._group(parameter), self.state[parameter]
        row_ED = state["row"].view(-1, parameter.shape[-2])[block]
        col_EH = state["col"].view(-1, parameter.shape[-1])[block]
        last_E, step, beta2 = state["last"].view(-1)[block], int(state["step"]) + 1, group["beta2"]
        # The averages of a matrix that was left out decay by one factor for each step.
        decay_E1 = (beta2 ** (step - last_E).double()).to(row_ED)[:, None]
        row_ED.mul_(decay_E1).add_(squares_EDH.mean(dim=2), alpha=1 - beta2)
        col_EH.mul_(decay_E1).add_(squares_EDH.mean(dim=1), alpha=1 - beta2)
        last_E.fill_(step)
        correction = 1 - beta2**step
        root_row_ED = (row_ED / correction).sqrt_().add_(group["eps"])
        root_col_EH = (col_EH / correction).sqrt_().add_(group["eps"])
        # g / sqrt(R C^T / mean(R)) without the matrix: one factor for each row, and one for each column.
        root_mean_E1 = (row_ED.mean(dim=1, keepdim=True) / correction).sqrt_().add_(group["eps"])
        scaled_EDH = torch.mul(grad_EDH, (root_mean_E1 / root_row_ED)[:, :, None], out=squares_EDH)
        by_col_E1H = (group["lr"] / root_col_EH)[:, None, :]
        weight_EDH = parameter.detach().view(-1, *parameter.shape[-2:])[block]
        if weight_EDH.dtype == scaled_EDH.dtype:
            weight_EDH.addcmul_(scaled_EDH, by_col_E1H, value=-1)
            return
        value_EDH = weight_EDH.to(scaled_EDH.dtype).addcmul_(scaled_EDH, by_col_E1H, value=-1)
        if (noise_EDH := self._draw(parameter, weight_EDH.shape, step, block.start)) is not None:
            round_at_random_(value_EDH, noise_EDH)
        weight_EDH.copy_(value_EDH)

    def _update_one(self, parameter: Tensor, index: int, grad_DH: Tensor) -> None:
        """What `_update` does, of one matrix on the CPU."""
        group, state = self._group(parameter), self.state[parameter]
        step = int(state["step"]) + 1
        row, matrices = self._matrices.get(parameter, (None, None))
        # The state may have been loaded, and the weights have other memory.
        if matrices is None or row is not state["row"] or matrices.address != parameter.data_ptr():
            row, shape = state["row"], parameter.shape
            matrices = Matrices(
                parameter.detach().view(-1, *shape[-2:]),
                row.view(-1, shape[-2]),
                state["col"].view(-1, shape[-1]),
                state["last"].view(-1),
            )
            self._matrices[parameter] = row, matrices
        constants = Constants(group["lr"], group["beta2"], group["eps"], 1 - group["beta2"] ** step)
        noise_EDH = self._draw(parameter, torch.Size((1, *grad_DH.shape)), step, index)
        matrices.update(index, grad_DH, step, constants, None if noise_EDH is None else noise_EDH[0])

    def _draw(self, parameter: Tensor, shape_EDH: torch.Size, step: int, first: int) -> Tensor | None:
        if self._noise is None or parameter.dtype != torch.bfloat16:
            return None
        number = self._number(parameter)
        return self._noise.draw(
            shape_EDH, parameter=number, step=step, first_matrix=first, device=parameter.device
        )

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    def _number(self, parameter: Tensor) -> int:
        ours = (p for group in self.param_groups for p in group["params"])
        return next(number for number, p in enumerate(ours) if p is parameter)


def _squares(grad_EDH: Tensor) -> Tensor:
    """float32 at least. One pass, and sums of it, are far quicker than norms along the rows' axis."""
    return grad_EDH.to(torch.promote_types(grad_EDH.dtype, torch.float32), copy=False).square()


def _blocks(grad_EDH: Tensor, used_E: Tensor | None) -> Iterator[slice]:
    """Runs of matrices that are updated together, at most as many as one chunk holds."""
    together = max(1, _CHUNK // max(grad_EDH[0].numel(), 1))
    for start, end in [(0, len(grad_EDH))] if used_E is None else _runs(used_E.flatten()):
        for first in range(start, end, together):
            yield slice(first, min(end, first + together))


def _runs(used_E: Tensor) -> list[tuple[int, int]]:
    """First and end of each run of true values."""
    padded_E = torch.nn.functional.pad(used_E.to(torch.int8), (1, 1))
    edges = padded_E.diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
