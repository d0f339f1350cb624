"""Cross entropy of a linear layer over a vocabulary, without all its logits at once where they are many.

Of logits [T, V] the loss needs two numbers a token: the target's logit, and the logarithm of the sum of all
exponentials. `target_and_logsumexp` finds them for some words at a time, forgets these words' logits, and
computes them once more in the backward pass, which turns them into gradients at once. That is a fourth
product where the plain way has three.

Words are cut and not tokens: each word's row of the weight is then read once in each pass, and its gradient
is written once and never added to, however few tokens there are. (torch 2.13 has `linear_cross_entropy`,
which cuts tokens: at 793,471 words and width 512 it takes two at a time.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Up to here the plain way, which has three products instead of four. With more logits what it takes for them,
# fresh memory several times in each pass, costs a CPU about as much as the fourth at width 512, and more at
# smaller widths (docs/large_models.md).
MAX_LOGITS = 1 << 22
# Logits at once where it is not plain. More of them leave the processor's caches between one pass and the
# next; with fewer words at a time products are slower.
_BLOCK_LOGITS = 1 << 21
_LEAST_WORDS = 256


def is_plain(num_tokens: int, num_words: int) -> bool:
    """Whether all logits are computed at once."""
    return num_tokens * num_words <= MAX_LOGITS


def block_words(num_tokens: int) -> int:
    """Words at once where it is not plain."""
    return max(_LEAST_WORDS, _BLOCK_LOGITS // max(1, num_tokens))


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor
) -> Tensor:
    """Negative log-likelihood in nats of each target, float32 at least, [T]; products as autocast says.

    Plain where the logits are at most `MAX_LOGITS`; more than that are never there at once, and then the
    result has a first derivative and no second.
    """
    if not is_plain(len(hidden_TD), len(weight_VD)):
        target_logit_T, logsumexp_T = target_and_logsumexp(hidden_TD, weight_VD, bias_V, target_T)
        return logsumexp_T - target_logit_T
    logits_TV = F.linear(hidden_TD, weight_VD, bias_V)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, target_T, reduction="none")


def target_and_logsumexp(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    *,
    words_at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logit of each target, and logarithm of the sum of all words' exponentials: [T] both, float32 at least.

    A target outside of the weight's rows has the logit 0: words may be spread over several calls, each with
    targets counted from its first word. words_at_once: None: as many as suit the number of tokens.
    """
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    words = block_words(len(hidden_TD)) if words_at_once is None else words_at_once
    found = _TargetAndLogsumexp.apply(hidden_TD, weight_VD, bias_V, target_T, words, dtype)
    assert found is not None
    return found


class _TargetAndLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Tensor,
        words_at_once: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = len(hidden_TD)
        narrow_TD, wide = hidden_TD.to(dtype), torch.promote_types(dtype, torch.float32)
        target_logit_T = hidden_TD.new_zeros(num_tokens, dtype=wide)
        logsumexp_T = hidden_TD.new_full((num_tokens,), -torch.inf, dtype=wide)
        for first in range(0, len(weight_VD), words_at_once):
            logits_TB = _logits(narrow_TD, weight_VD, bias_V, slice(first, first + words_at_once))
            is_here_T, index_T1 = _places(target_T, first, logits_TB.shape[1])
            target_logit_T = torch.where(is_here_T, logits_TB.gather(1, index_T1)[:, 0], target_logit_T)
            # Not -inf, of which nothing can be taken away: words may have no share at all.
            greatest_T = logits_TB.amax(dim=1).clamp_min(torch.finfo(wide).min)
            sum_T = logits_TB.sub_(greatest_T[:, None]).exp_().sum(dim=1)
            logsumexp_T = torch.logaddexp(logsumexp_T, greatest_T + sum_T.log())
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, logsumexp_T)
        ctx.words_at_once, ctx.dtype = words_at_once, dtype
        return target_logit_T, logsumexp_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_target_T: Tensor, grad_logsumexp_T: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        hidden_TD, weight_VD, bias_V, target_T, logsumexp_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        narrow_TD, wide = hidden_TD.to(ctx.dtype), logsumexp_T.dtype
        grad_hidden_TD = hidden_TD.new_zeros(hidden_TD.shape, dtype=wide) if needs_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
        for first in range(0, len(weight_VD), ctx.words_at_once):
            words = slice(first, first + ctx.words_at_once)
            slope_TB = _logits(narrow_TD, weight_VD, bias_V, words)
            slope_TB.sub_(logsumexp_T[:, None]).exp_().mul_(grad_logsumexp_T[:, None])
            is_here_T, index_T1 = _places(target_T, first, slope_TB.shape[1])
            slope_TB.scatter_add_(1, index_T1, (grad_target_T * is_here_T)[:, None])
            if grad_bias_V is not None:
                grad_bias_V[words] = slope_TB.sum(dim=0)
            narrow_slope_TB = slope_TB.to(ctx.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD[words] = narrow_slope_TB.t() @ narrow_TD
            if grad_hidden_TD is not None:
                grad_hidden_TD += narrow_slope_TB @ weight_VD[words].to(ctx.dtype)
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD.to(hidden_TD.dtype)
        return grad_hidden_TD, grad_weight_VD, grad_bias_V, None, None, None


def _logits(narrow_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, words: slice) -> Tensor:
    """Of some words, float32 at least, in memory of their own."""
    dtype, wide = narrow_TD.dtype, torch.promote_types(narrow_TD.dtype, torch.float32)
    bias_B = None if bias_V is None else bias_V[words].to(wide)
    weight_BD = weight_VD[words].to(dtype)
    if dtype == wide:
        return F.linear(narrow_TD, weight_BD, bias_B)
    logits_TB = F.linear(narrow_TD, weight_BD).to(wide)
    return logits_TB if bias_B is None else logits_TB.add_(bias_B)


def _places(target_T: Tensor, first: int, num_words: int) -> tuple[Tensor, Tensor]:
    """Which targets are among these words, [T]; and where, [T, 1], or anywhere for others."""
    index_T = target_T - first
    return (index_T >= 0) & (index_T < num_words), index_T.clamp(0, num_words - 1)[:, None]
