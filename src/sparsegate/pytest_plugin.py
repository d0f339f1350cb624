"""`pytest --conform PACKAGE:FACTORY`: each law of the conformance suite as a test.

Every pytest run in an environment that has sparsegate loads this module; it stands here, and not in
`evaluation`, because importing that would make all of them wait for torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .evaluation.conformance.law import Factory, Law


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsegate", "conformance of mixture-of-experts layers")
    group.addoption("--conform", metavar="PACKAGE:FACTORY", help="try the paper's laws on this layer")
    group.addoption("--conform-width", type=int, metavar="N", help="width of its input, if it is a module")


def pytest_configure(config: pytest.Config) -> None:
    """Without paths on the command line, the laws are all there is to run."""
    if config.option.conform and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.option.conform:
        items.extend(Target.from_parent(session, name=config.option.conform, nodeid="conform").collect())


class Target(pytest.Collector):
    """The layer under test."""

    def collect(self) -> Iterator["LawItem"]:
        from .evaluation.conformance.suite import LAWS
        from .evaluation.conformance.target import load_factory

        try:
            factory = load_factory(self.name, width=self.config.option.conform_width)
        except ValueError as error:
            raise pytest.UsageError(f"--conform: {error}") from error
        for law in LAWS:
            yield LawItem.from_parent(self, name=law.name, law=law, factory=factory)


class Broken(Exception):
    """A law that the layer breaks."""


class LawItem(pytest.Item):
    """One law."""

    def __init__(self, *, law: "Law", factory: "Factory", **of_pytest: Any) -> None:
        super().__init__(**of_pytest)
        self.law = law
        self.factory = factory

    def runtest(self) -> None:
        from .evaluation.conformance.suite import try_law

        outcome = try_law(self.law, self.factory)
        if outcome.result == "skipped":
            pytest.skip(outcome.told)
        if outcome.result == "failed":
            raise Broken(f"{self.law.statement} ({self.law.source})\n{outcome.told}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, Broken):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"{self.config.option.conform}: {self.name}"
