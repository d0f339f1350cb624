"""Every test of the models runs in poisoned memory."""

from collections.abc import Iterator

import pytest

from tests.helpers.poison import poisoned_memory


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
