"""Attention: how well each step of the source fits each step of the target (appendix G).

Where source and target meet, U is a step of the source and S one of the target, A the attention's width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Sources as the decoder sees them, encoded once.

    value_BUD: the encoder's output. key_BUA: what is compared with queries. mask_BU: bool, true for real
    tokens.
    """

    value_BUD: Tensor
    key_BUA: Tensor
    mask_BU: Tensor

    @property
    def num_sentences(self) -> int:
        return self.value_BUD.shape[0]

    def select(self, sentence_B: Tensor) -> "Memory":
        """Some of the sentences. sentence_B: int64."""
        return Memory(
            value_BUD=self.value_BUD[sentence_B],
            key_BUA=self.key_BUA[sentence_B],
            mask_BU=self.mask_BU[sentence_B],
        )


class Attention(nn.Module, ABC):
    """Softmax over the scores of the source's real tokens; the context is the mean with these weights.

    A source without a real token has weights and context 0. Parameters: w_source, w_query [D, A], w_score [A]
    (U, W and V of the paper).
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w_source = nn.Parameter(torch.empty(width, hidden, device=device, dtype=dtype))
        self.w_query = nn.Parameter(torch.empty(width, hidden, device=device, dtype=dtype))
        self.w_score = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance 1/fan_in, so that at the start all of a source has about equal weight."""
        for weight in (self.w_source, self.w_query, self.w_score):
            nn.init.normal_(weight, std=weight.shape[0] ** -0.5)

    def remember(self, value_BUD: Tensor, mask_BU: Tensor) -> Memory:
        """What of the encoder's output every query is compared with."""
        return Memory(value_BUD=value_BUD, key_BUA=self.keys(value_BUD), mask_BU=mask_BU)

    def forward(self, query_BSD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Context [B, S, D], and weights [B, S, U] in float32 at least.

        A sentence may have several rows of queries, as the hypotheses of a beam: R rows are R/B consecutive
        ones for each sentence of the memory.

        Raises:
            ValueError: the rows are not equally many for each sentence.
        """
        num_rows, num_steps, width = query_BSD.shape
        # A rank may have no sentence of a batch.
        rows_per_sentence, more = (
            divmod(num_rows, memory.num_sentences) if memory.num_sentences else (1, num_rows)
        )
        if more:
            raise ValueError(
                f"query_BSD ({num_rows} rows) must have equally many rows for each of the memory's sentences "
                f"({memory.num_sentences})"
            )
        # All queries of a sentence side by side: its keys and values are never copied.
        by_sentence_BSD = query_BSD.reshape(memory.num_sentences, rows_per_sentence * num_steps, width)
        score_BSU = self.scores(by_sentence_BSD, memory.key_BUA)
        score_BSU = score_BSU.to(torch.promote_types(score_BSU.dtype, torch.float32))
        weight_BSU = masked_softmax(score_BSU, memory.mask_BU[:, None, :])
        context_BSD = weight_BSU.to(memory.value_BUD.dtype) @ memory.value_BUD
        return (
            context_BSD.reshape(num_rows, num_steps, context_BSD.shape[2]),
            weight_BSU.reshape(num_rows, num_steps, weight_BSU.shape[2]),
        )

    @abstractmethod
    def keys(self, value_BUD: Tensor) -> Tensor:
        """What of the source does not depend on the query, [B, U, A]."""

    @abstractmethod
    def scores(self, query_BSD: Tensor, key_BUA: Tensor) -> Tensor:
        """[B, S, U]."""

    def ops_per_token(self) -> tuple[int, int]:
        """Multiply-adds per token of the source, and of the target, without those per pair of the two."""
        return self.w_source.numel(), self.w_query.numel()


class ProductAttention(Attention):
    """Eq. 22: sum over d of V_d tanh((x U)_d) tanh((y W)_d), one product of matrices for all pairs."""

    def keys(self, value_BUD: Tensor) -> Tensor:
        return (value_BUD @ self.w_source).tanh()

    def scores(self, query_BSD: Tensor, key_BUA: Tensor) -> Tensor:
        return ((query_BSD @ self.w_query).tanh() * self.w_score) @ key_BUA.transpose(1, 2)


class AdditiveAttention(Attention):
    """GNMT's, eq. 21: sum over d of V_d tanh((x U)_d + (y W)_d). It takes B * S * U * A numbers in training.

    Without gradients there are B * U * A of them at once, as the steps of the target come one by one.
    """

    def keys(self, value_BUD: Tensor) -> Tensor:
        return value_BUD @ self.w_source

    def scores(self, query_BSD: Tensor, key_BUA: Tensor) -> Tensor:
        steps = (query_BSD @ self.w_query).split(1, dim=1)
        return torch.stack([(key_BUA + step_B1A).tanh() @ self.w_score for step_B1A in steps], dim=1)


def masked_softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where the mask is true, 0 elsewhere, and 0 where it is true nowhere."""
    # A row of -inf alone would be NaN in value and gradient.
    kept = score.masked_fill(~mask & mask.any(dim=-1, keepdim=True), -torch.inf)
    return kept.softmax(dim=-1).masked_fill(~mask, 0.0)
