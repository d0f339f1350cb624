"""Experts as two grouped products between dispatch and combine, with whichever grouped product is given."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..dispatch import Plan, combine, dispatch
from .activations import ACTIVATIONS, ActivationName

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def feed_forward(
    x_TD: Tensor,
    w_in_EDS: Tensor,
    w_out_EHD: Tensor,
    weight_N: Tensor,
    plan: Plan,
    *,
    activation: ActivationName,
    recompute: bool,
    product: GroupedProduct,
) -> Tensor:
    """y_t = sum over the pairs of t of weight * act(x_t w_in) w_out (eq. 1 with feed-forward experts).

    w_in_EDS: S columns, as many as the activation takes for H. weight_N: the gate's, in the routing's order.
    recompute: keep no hidden layer for backward but compute it again. product: of rows, matrices and ends.
    Returns y_TD in x's dtype; products follow autocast, the sum is in the wider dtype of product and weight.
    Derivatives are of as high an order as those of `product`.
    """

    def rows(x_TD: Tensor, w_in_EDS: Tensor, w_out_EHD: Tensor) -> Tensor:
        in_NS = product(dispatch(x_TD, plan), w_in_EDS, plan.end_E)
        return product(ACTIVATIONS[activation](in_NS), w_out_EHD, plan.end_E)

    if recompute:
        rows_ND = checkpoint(rows, x_TD, w_in_EDS, w_out_EHD, use_reentrant=False, preserve_rng_state=False)
    else:
        rows_ND = rows(x_TD, w_in_EDS, w_out_EHD)
    return combine(rows_ND, plan, weight_N).to(x_TD.dtype)
