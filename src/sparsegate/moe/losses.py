"""Balance losses (section 4 and appendix A of the paper): unweighted scalars, functions of BalanceSums."""

import torch
from torch import Tensor

from .routing import BalanceSums, Routing


def squared_cv(value_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance over squared mean: 0 when all entries are equal.

    value_E: [E], float. Returns a scalar of the same dtype; 0 for a zero vector.
    """
    mean = value_E.mean()
    # Keeps 0 / 0 away; the 1e-10 of the authors' code would lower the loss of small batches as well.
    return torch.mean((value_E - mean) ** 2) / (mean**2 + torch.finfo(value_E.dtype).tiny)


def importance_loss(balance: Routing | BalanceSums) -> Tensor:
    """CV(Importance)², eq. 7 without its weight: experts' total gate weights should be equal."""
    return squared_cv(balance.sums.importance_E)


def load_loss(balance: Routing | BalanceSums) -> Tensor:
    """CV(Load)², eq. 11 without its weight: experts should receive equally many tokens.

    Where the gate has no smooth load (evaluation, no noise, k = n) this is the CV² of the hard counts, which
    carries no gradient.
    """
    return squared_cv(balance.sums.load_E)


def z_loss(balance: Routing | BalanceSums) -> Tensor:
    """Mean over the tokens of (log sum exp of the gate's logits)² (Zoph et al. 2022, eq. 5), unweighted.

    It keeps logits small, and with them the rounding of the softmax; the usual weight is 0.001. 0 without
    tokens. The noise of eq. 4 is not in these logits; a jittered input is.
    """
    sums = balance.sums
    return sums.z / sums.num_tokens.clamp_min(1)


def switch_loss(balance: Routing | BalanceSums) -> Tensor:
    """E * sum over experts of (share of the pairs) * (mean probability) (Fedus et al. 2021, eq. 4 to 6).

    Unweighted; the usual weight is 0.01. All k pairs of a token count, and the shares add up to 1, so that
    perfect balance is 1 for any k. 0 without tokens. The gradient goes through the probabilities alone.
    """
    sums = balance.sums
    probability_E = sums.probability_E / sums.num_tokens.clamp_min(1)
    share_E = sums.count_E.to(probability_E.dtype) / sums.count_E.sum().clamp_min(1)
    return sums.count_E.shape[0] * (share_E * probability_E).sum()


def threshold_loss(balance: Routing | BalanceSums) -> Tensor:
    """What trains the thresholds of `Balanced`: eq. 20 over the number of tokens; 0 without tokens.

    Unweighted. It has no gradient but for the thresholds, so its weight matters to the optimizer alone. The
    paper's is a sum over the batch; a mean does not grow with it.
    """
    sums = balance.sums
    return sums.threshold / sums.num_tokens.clamp_min(1)
