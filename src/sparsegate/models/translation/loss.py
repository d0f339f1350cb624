"""What a model pays for each target token, in pieces that fit memory."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..softmax import OutputSoftmax

# Logits that exist at once: 64 MB in float32, and about three times as much inside a cross entropy.
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Of each target token, float32 at least, 0 where it is padding; sums over a batch are their `.sum()`.

    nll_BS: negative log-likelihood of the label in nats. loss_BS: what training lowers; the same without
    label smoothing.
    """

    nll_BS: Tensor
    loss_BS: Tensor


def token_losses(
    softmax: OutputSoftmax,
    hidden_BSD: Tensor,
    label_BS: Tensor,
    mask_BS: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> TokenLosses:
    """The losses of the real target tokens; the softmax is computed for no others.

    label_BS: int64. mask_BS: bool. label_smoothing: share of the target that is spread evenly over the whole
    vocabulary: (1 - e) nll + e times the mean over all words of -log p. The logits are computed in pieces,
    and in training once more for the gradient, so that memory does not grow with the batch.

    Raises:
        ValueError: label_smoothing is out of range, or with a sampled softmax.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1")
    if label_smoothing and softmax.training and softmax.num_samples:
        raise ValueError(
            f"label_smoothing ({label_smoothing}) needs the probabilities of all words; set it to 0, or "
            "softmax_samples to 0"
        )
    hidden_TD, label_T = hidden_BSD[mask_BS], label_BS[mask_BS]
    # Drawn here, so that all pieces have the same candidates, when they are computed again as well.
    sample_S = softmax.draw() if softmax.training and softmax.num_samples else None
    num_logits = softmax.vocab_size if sample_S is None else len(sample_S)
    rows = max(1, _MAX_LOGITS // num_logits)
    pieces = list(zip(hidden_TD.split(rows), label_T.split(rows), strict=True))
    losses = [_piece(softmax, *piece, sample_S, label_smoothing, again=len(pieces) > 1) for piece in pieces]
    nll_T, loss_T = (torch.cat(parts) for parts in zip(*losses, strict=True))
    zeros_BS = nll_T.new_zeros(mask_BS.shape)
    return TokenLosses(
        nll_BS=zeros_BS.masked_scatter(mask_BS, nll_T), loss_BS=zeros_BS.masked_scatter(mask_BS, loss_T)
    )


def _piece(
    softmax: OutputSoftmax,
    hidden_TD: Tensor,
    label_T: Tensor,
    sample_S: Tensor | None,
    label_smoothing: float,
    *,
    again: bool,
) -> tuple[Tensor, Tensor]:
    """nll and loss of some tokens. again: compute logits again for the gradient and keep none until then."""

    def compute(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        if sample_S is not None:
            nll_T = softmax.sampled_nll(hidden_TD, label_T, sample_S)
            return nll_T, nll_T
        if not label_smoothing:
            nll_T = softmax.nll(hidden_TD, label_T)
            return nll_T, nll_T
        nll_T, uniform_T = softmax.nll_and_uniform(hidden_TD, label_T)
        return nll_T, (1 - label_smoothing) * nll_T + label_smoothing * uniform_T

    if again and torch.is_grad_enabled():
        return checkpoint(compute, hidden_TD, use_reentrant=False)
    return compute(hidden_TD)
