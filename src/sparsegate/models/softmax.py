"""The output layer: from the last hidden layer to a distribution over the vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FullSoftmax(nn.Module):
    """Softmax over the whole vocabulary. Parameters: weight [V, width], bias [V]."""

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., width]."""
        return F.linear(hidden, self.weight, self.bias)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood in nats, float32 at least, of the shape of `target`.

        hidden: [..., width]. target: int64 [...].
        """
        logits_TV = self(hidden).reshape(-1, self.weight.shape[0])
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return F.cross_entropy(logits_TV, target.flatten(), reduction="none").view_as(target)

    def ops_per_token(self) -> int:
        """Multiply-adds per token; the paper's language model metric leaves them out."""
        return self.weight.numel()
