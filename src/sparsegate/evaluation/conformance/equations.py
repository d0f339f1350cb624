"""Equations 3 to 11 as they read, for every expert and every token: what laws expect."""

import torch
from torch import Tensor


def gates(logit_TE: Tensor, k: int) -> Tensor:
    """Eq. 3 and 5: the softmax over the k largest logits of each row, zero elsewhere. Returns [T, E]."""
    kept_TE = torch.zeros_like(logit_TE, dtype=torch.bool)
    kept_TE.scatter_(1, logit_TE.argsort(dim=1, descending=True, stable=True)[:, :k], True)
    return torch.where(kept_TE, logit_TE, -torch.inf).softmax(dim=1)


def probability_in_topk(clean_TE: Tensor, std_TE: Tensor, noise_TE: Tensor, k: int) -> Tensor:
    """Eq. 9: P(x, i) for a drawn noise; the k-th largest noisy logit of the others is the threshold."""
    noisy_TE = clean_TE + noise_TE * std_TE
    columns = []
    for i in range(clean_TE.shape[1]):
        others_TE = torch.cat([noisy_TE[:, :i], noisy_TE[:, i + 1 :]], dim=1)
        kth_T = others_TE.sort(dim=1, descending=True).values[:, k - 1]
        columns.append((clean_TE[:, i] - kth_T) / std_TE[:, i])
    return 0.5 * (1 + torch.erf(torch.stack(columns, dim=1) / 2**0.5))


def squared_cv(value_E: Tensor) -> Tensor:
    """Eq. 7 and 11: the variance over the experts (population), over the squared mean."""
    return value_E.var(correction=0) / value_E.mean() ** 2
