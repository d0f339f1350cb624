"""Processes that read a text together, each its share: what a model of experts on several of them needs."""

from typing import Any, Protocol, TypeVar

Sums = TypeVar("Sums")


class Peers(Protocol):
    """This process among its peers, who call everything alike: each method, and each pass of a model.

    A process whose share is done, or is none, goes on with passes of no rows until all are done, since its
    experts may have tokens of the others.
    """

    def rows(self, num_rows: int) -> range:
        """This process's share of rows: consecutive, perhaps none."""
        ...

    def total(self, sums: Sums) -> Sums:
        """Tensors in any nest, added up over all."""
        ...

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all."""
        ...

    def tell_all(self, value: list[Any]) -> list[Any]:
        """Each process's value, which JSON can hold, in the order of the processes."""
        ...


class _Alone:
    """No peers."""

    def rows(self, num_rows: int) -> range:
        return range(num_rows)

    def total(self, sums: Sums) -> Sums:
        return sums

    def sum(self, *values: float) -> list[float]:
        return list(values)

    def tell_all(self, value: list[Any]) -> list[Any]:
        return [value]


ALONE = _Alone()
