"""SwiGLU experts (Shazeer 2020): the feed-forward network of most mixtures since."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.grouped import grouped_product
from .experts import RowExperts


class SwiGLU(RowExperts):
    """E experts (silu(x W) * (x V)) W_out, without biases (Shazeer 2020, eq. 6).

    Parameters: w_in [E, width, 2 * hidden], whose first half of columns is W and second half V; w_out
    [E, hidden, width]. Three products of width times hidden where `FeedForward` has two: at equal cost take
    two thirds of its hidden width.

    width: of input and output.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(width, hidden, num_experts) < 1:
            raise ValueError(f"width ({width}), hidden ({hidden}), num_experts ({num_experts}) must be >= 1")
        self.num_experts = num_experts
        self.w_in = nn.Parameter(torch.empty(num_experts, width, 2 * hidden, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of variance 1/fan_in."""
        _, width, _ = self.w_in.shape
        nn.init.normal_(self.w_in, std=width**-0.5)
        nn.init.normal_(self.w_out, std=self.w_out.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        num_experts, hidden, width = self.w_out.shape
        return f"width={width}, hidden={hidden}, num_experts={num_experts}"

    def ops_per_pair(self) -> int:
        return self.w_in[0].numel() + self.w_out[0].numel()

    def compute_rows(self, rows_ND: Tensor, end_E: Tensor) -> Tensor:
        swish_NH, linear_NH = grouped_product(rows_ND, self.w_in, end_E).chunk(2, dim=-1)
        return grouped_product(F.silu(swish_NH) * linear_NH, self.w_out, end_E)
