"""The laws, and how they are tried on an implementation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from . import balance, black_box, gating, mixture
from .law import Factory, Law, NotApplicable, Number
from .trial import draws_of, one_line

LAWS: tuple[Law, ...] = (*black_box.LAWS, *gating.LAWS, *balance.LAWS, *mixture.LAWS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one law.

    numbers: what was compared; empty where nothing could be. reason: of a skipped law, what is missing or
    why it does not apply; of a failed one, the exception that the implementation raised, else "".
    """

    law: Law
    result: Literal["passed", "failed", "skipped"]
    numbers: Sequence[Number] = ()
    reason: str = ""

    @property
    def broken(self) -> list[Number]:
        """The numbers that do not hold."""
        return [number for number in self.numbers if not number.holds]

    @property
    def told(self) -> str:
        """Why it failed or was skipped, one line for each number; of a passed law ""."""
        return self.reason or "\n".join(map(str, self.broken))


def try_law(law: Law, factory: Factory, *, seed: int = 0) -> Outcome:
    """Try one law on new implementations from a factory.

    Whatever the implementation raises is a failure of the law. Everything random follows from the seed; the
    global generator is left as it was.
    """
    try:
        with draws_of(seed):
            missing = law.missing(factory())
        if missing:
            return Outcome(law=law, result="skipped", reason=f"not exposed: {', '.join(missing)}")
        with draws_of(seed):
            numbers = law.check(factory)
    except NotApplicable as reason:
        return Outcome(law=law, result="skipped", reason=str(reason))
    except Exception as error:
        return Outcome(law=law, result="failed", reason=one_line(error))
    holds = all(number.holds for number in numbers)
    return Outcome(law=law, result="passed" if holds else "failed", numbers=numbers)


def conform(factory: Factory, laws: Sequence[Law] = LAWS) -> Iterator[Outcome]:
    """Try laws one after the other. The factory takes no arguments and makes a new implementation each time.

    >>> from sparsegate.evaluation.conformance.own import noisy_topk
    >>> {outcome.result for outcome in conform(noisy_topk, LAWS[:2])}
    {'passed'}
    """
    for law in laws:
        yield try_law(law, factory)
