"""The paper's experts: one hidden ReLU layer, no biases, stacked."""

import torch
from torch import Tensor, nn

from ..kernels.grouped import grouped_product
from .experts import RowExperts


class FeedForward(RowExperts):
    """E experts relu(x W_in) W_out, without biases (section 5.1: the parameter counts have no room for them).

    Parameters: w_in [E, width, hidden], w_out [E, hidden, width]. width: of input and output.
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
        self.w_in = nn.Parameter(torch.empty(num_experts, width, hidden, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of variance 2/fan_in before the ReLU and 1/fan_in after it: activations keep their size."""
        _, width, hidden = self.w_in.shape
        nn.init.normal_(self.w_in, std=(2 / width) ** 0.5)
        nn.init.normal_(self.w_out, std=hidden**-0.5)

    def extra_repr(self) -> str:
        num_experts, width, hidden = self.w_in.shape
        return f"width={width}, hidden={hidden}, num_experts={num_experts}"

    def ops_per_pair(self) -> int:
        return self.w_in[0].numel() + self.w_out[0].numel()

    def compute_rows(self, rows_ND: Tensor, end_E: Tensor) -> Tensor:
        hidden_NH = grouped_product(rows_ND, self.w_in, end_E).relu_()
        return grouped_product(hidden_NH, self.w_out, end_E)
