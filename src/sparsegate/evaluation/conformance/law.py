"""What a law is, and the numbers that it compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from .implementation import Implementation

Factory: TypeAlias = Callable[[], Implementation]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Number:
    """One comparison: `measured` must be within `tolerance` of `expected`. NaN never is."""

    what: str
    measured: float
    expected: float
    tolerance: float = 0.0

    @property
    def holds(self) -> bool:
        return abs(self.measured - self.expected) <= self.tolerance

    def __str__(self) -> str:
        within = f" within {self.tolerance:.2g}" if self.tolerance else ""
        return f"{self.what}: {self.measured:.8g}, expected {self.expected:.8g}{within}"


class NotApplicable(Exception):
    """A law has nothing to say about this implementation; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """Something that the paper says of every implementation of its layer.

    name: what holds, in words with hyphens. statement: the same as a sentence. source: where the paper says
    it, or what follows from what. needs: the fields of Implementation without which it cannot be tried.
    check: tries it on implementations from the factory, each of them new, and returns the numbers; raises
    NotApplicable, and passes on whatever the implementation raises.
    """

    name: str
    statement: str
    source: str
    needs: tuple[str, ...] = ()
    check: Callable[[Factory], Sequence[Number]]

    def missing(self, implementation: Implementation) -> list[str]:
        """The fields that it needs and that are not exposed."""
        values = [(name, getattr(implementation, name)) for name in self.needs]
        return [name for name, value in values if value is None or value is False]


def exposed(value: T | None) -> T:
    """A field that the law's `needs` name, and that is therefore there."""
    assert value is not None
    return value
