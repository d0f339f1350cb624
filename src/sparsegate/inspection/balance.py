"""How evenly the experts are used: the columns of table 6 of the paper, as numbers for people."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moe.routing import BalanceSums

BALANCE_METRICS = (
    "cv_importance",
    "cv_load",
    "max_over_mean_load",
    "dead_experts",
    "unrouted_share",
    "dropped_share",
)


def balance_metrics(sums: BalanceSums, *, ranks: Sequence[range] = ()) -> dict[str, float]:
    """The metrics named in `BALANCE_METRICS`, of one batch or of several whose sums were added.

    ranks: the experts of each rank, where they are spread over several; there is one metric more then.

    cv_importance, cv_load: coefficients of variation (population deviation over mean, not squared) of the
        gate weights and of the smooth load over the experts. 0 is perfect balance, sqrt(E/k - 1) is collapse
        onto the same k of E experts.
    max_over_mean_load: tokens of the busiest expert over the mean, hard counts. 1 is perfect balance, E/k is
        collapse.
    dead_experts: number of experts that received no token.
    unrouted_share: share of the tokens that no expert took. dropped_share: share of the token-expert pairs
        that a capacity dropped; they count as received in the others.
    max_over_mean_rank_load: tokens of all experts of the busiest rank over the mean of the ranks, a token
        once for each of its experts. The others wait for it: at 1.2 for a sixth of the experts' time.

    Without any token all but `dead_experts` are 0, and every expert is dead. Sums that are not finite give
    nan. Copies the sums to the host, which waits for the device.
    """
    importance_E, load_E, count_E = (
        value_E.detach().cpu().double() for value_E in (sums.importance_E, sums.load_E, sums.count_E)
    )
    metrics = {
        "cv_importance": _cv(importance_E),
        "cv_load": _cv(load_E),
        "max_over_mean_load": _over_mean(count_E.max(), count_E),
        "dead_experts": float((count_E == 0).sum()),
        "unrouted_share": int(sums.num_unrouted) / max(int(sums.num_tokens), 1),
        "dropped_share": int(sums.num_dropped) / max(int(count_E.sum()), 1),
    }
    if ranks:
        count_W = torch.stack([count_E[own.start : own.stop].sum() for own in ranks])
        metrics["max_over_mean_rank_load"] = _over_mean(count_W.max(), count_W)
    return metrics


def _cv(value_E: Tensor) -> float:
    return _over_mean(value_E.std(correction=0), value_E)


def _over_mean(value: Tensor, value_E: Tensor) -> float:
    """`value` over the mean of `value_E`, all of whose entries are at least 0; 0 where they are all 0."""
    mean = value_E.mean()
    return float(torch.where(mean == 0, 0.0, value / mean))
