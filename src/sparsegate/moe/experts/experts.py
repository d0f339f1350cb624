"""Experts: the interface of everything that computes, and the base of those that work on rows by expert."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..dispatch import combine, dispatch, plan_rows
from ..kernels.sink import GradientSink
from ..routing import Routing


class Experts(nn.Module, ABC):
    """Computes: `experts(x_TD, routing) -> y_TD`, the sum of eq. 1 for every token, in x's dtype."""

    num_experts: int

    @abstractmethod
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return y_TD; zero for a token that no pair of the routing names."""

    def give_gradients_to(self, sink: GradientSink | None) -> None:
        """From now on the backward pass gives the weights' gradients to the sink; None: to `.grad`.

        ValueError: these experts cannot.
        """
        if sink is not None:
            raise ValueError(f"experts ({type(self).__name__}) cannot give gradients away: use stacked ones")

    @abstractmethod
    def ops_per_pair(self) -> int:
        """Multiply-adds per token-expert pair in the forward pass."""

    def part(self, first: int, end: int) -> "Experts":
        """Experts `first` to `end - 1` alone, with copies of their weights; on the meta device without any.

        What spreads experts over ranks asks for it. ValueError: these experts cannot be taken apart.
        """
        raise ValueError(
            f"experts ({type(self).__name__}) cannot be taken apart; give the class a method part(first, end)"
        )


class RowExperts(Experts):
    """Experts that map rows standing in expert order: dispatch, compute, combine."""

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        plan = plan_rows(routing)
        rows_ND = self.compute_rows(dispatch(x_TD, plan), plan.end_E)
        return combine(rows_ND, plan, routing.weight_N).to(x_TD.dtype)

    @abstractmethod
    def compute_rows(self, rows_ND: Tensor, end_E: Tensor) -> Tensor:
        """Apply expert e to rows `end_E[e - 1]` to `end_E[e]`; zeros for the rows past the last end."""
