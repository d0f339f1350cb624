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
