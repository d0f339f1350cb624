"""What every test starts from: one thread, a seeded generator, and examples that come back the same."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers.ranks import Ranks

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch leaves to its first use

# There is one fork server for all tests, and it imports once what the processes that they start need.
multiprocessing.set_forkserver_preload(
    ["tests.data.children", "tests.data.parallel.children", "tests.helpers.savers"]
)

# `pytest --hypothesis-profile nightly` chooses the other one; what it finds, it prints as a blob to replay.
settings.register_profile("short", max_examples=200, derandomize=True, deadline=None)
settings.register_profile(
    "nightly", max_examples=2000, print_blob=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that are ranks, started once for the session: each takes seconds to import torch."""
    ranks = Ranks()
    yield ranks
    ranks.stop()
