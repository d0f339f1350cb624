"""Balance losses (section 4 and appendix A of the paper): unweighted scalars, functions of BalanceSums."""

import torch
from torch import Tensor

from .routing import BalanceSums, Routing

# The authors' code guards the division with this; it also makes the loss of an empty batch 0.
_EPSILON = 1e-10


def squared_cv(value_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance over squared mean: 0 when all entries are equal.

    value_E: [E], float. Returns a scalar of the same dtype; 0 for a zero vector.
    """
    mean = value_E.mean()
    return torch.mean((value_E - mean) ** 2) / (mean**2 + _EPSILON)


def importance_loss(balance: Routing | BalanceSums) -> Tensor:
    """CV(Importance)², eq. 7 without its weight: experts' total gate weights should be equal."""
    return squared_cv(balance.sums.importance_E)


def load_loss(balance: Routing | BalanceSums) -> Tensor:
    """CV(Load)², eq. 11 without its weight: experts should receive equally many tokens.

    Where the gate has no smooth load (evaluation, no noise, k = n) this is the CV² of the hard counts, which
    carries no gradient.
    """
    return squared_cv(balance.sums.load_E)
