"""Ranks meet, or say in time who is missing."""

import socket
import threading
import time

import pytest

from sparsegate.training.meeting import open_store, wait_for_all

WITHIN_S = 0.5


@pytest.fixture
def environment() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def meet(environment: dict[str, str], rank: int, *, within_s: float = 10.0) -> None:
    store = open_store(environment | {"RANK": str(rank)}, within_s=within_s)
    wait_for_all(store, rank=rank, num_ranks=3, within_s=within_s)


def test_ranks_that_are_all_there_meet(environment):
    store = open_store(environment, within_s=10)
    others = [threading.Thread(target=meet, args=(environment, rank)) for rank in (2, 1)]
    for other in others:
        other.start()
    wait_for_all(store, rank=0, num_ranks=3, within_s=10)
    for other in others:
        other.join()


def test_ranks_that_do_not_come_are_named(environment):
    with pytest.raises(ValueError, match=r"WORLD_SIZE \(3\): rank 1, 2 did not come within 0.5 s; start all"):
        meet(environment, 0, within_s=WITHIN_S)


def test_a_rank_that_finds_nobody_says_where(environment):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"MASTER_PORT \(127\.0\.0\.1:\d+\): rank 1 of 3 cannot meet"):
        meet(environment, 1, within_s=WITHIN_S)
    assert time.monotonic() - started < 10


def test_a_first_rank_that_has_left_is_missed_at_once(environment):
    store = open_store(environment, within_s=10)
    said: list[str] = []

    def second() -> None:
        try:
            meet(environment, 1, within_s=60)
        except ValueError as error:
            said.append(str(error))

    other = threading.Thread(target=second)
    other.start()
    while not store.check(["here/1"]):
        assert other.is_alive()
        time.sleep(0.01)
    del store
    other.join(timeout=20)
    assert "rank 0 left before all were there" in said[0]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_launcher_that_does_not_say_is_named(name, environment):
    del environment[name]
    with pytest.raises(ValueError, match=rf"{name} \(not set\) must be a number, which torchrun sets"):
        open_store(environment, within_s=WITHIN_S)
