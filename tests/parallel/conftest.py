"""The ranks that the laws of this folder run on."""

import pytest

from tests.helpers.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Started once for the session, as each process takes seconds to import torch."""
    ranks = Ranks()
    yield ranks
    ranks.stop()
