"""Which ranks the others have waited for in vain, when a collective fails."""

import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from .. import parallel

GRACE_S = 2.0
_AMONG_NEAR = ("counts", "exchange", "vocabulary")  # where ranks wait for those that share the experts
_COLLECTIVES = (Path(dist.__file__).parent, Path(parallel.__file__).parent)


class RankMissing(RuntimeError):
    """A process of the run did not come to where the others waited for it, or is no more."""


@contextmanager
def naming_the_missing(
    group: dist.ProcessGroup | None,
    step: Callable[[], int],
    *,
    near: Callable[[], Collection[int]] | None = None,
) -> Iterator[None]:
    """Within the block a collective that fails is a RankMissing that names the ranks, the step and the place.

    Those that are not missing fail as well, within moments of the first: the engine breaks the connections
    of a rank that has given up. Each says so in the store of the group; who does not within GRACE_S is
    missing. group: None for a process that is alone. near: the ranks that tokens travel among, where these
    are not all: whoever waited for one of them does not know of others, which may be computing.
    """
    try:
        yield
    except RuntimeError as error:
        if group is None or not _is_of_a_collective(error):
            raise
        place = next(f for f in reversed(traceback.extract_tb(error.__traceback__)) if _is_ours(f.filename))
        missing = _missing(group)
        if near is not None and Path(place.filename).stem in _AMONG_NEAR:
            missing = [rank for rank in missing if rank in near()] or missing
        whom = f"rank {', '.join(map(str, missing))}" if missing else "each other, as one came too late"
        raise RankMissing(
            f"the ranks waited in vain for {whom}, after step {step()}, in {Path(place.filename).stem}."
            f"{place.name} ({' '.join(str(error).split())}); look at what became of it, and start again with "
            "--resume; where it was only slow, with a greater training.timeout"
        ) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return any(Path(innermost.filename).is_relative_to(folder) for folder in _COLLECTIVES)


def _is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(Path(parallel.__file__).parents[1])


def _missing(group: dist.ProcessGroup) -> list[int]:
    """In a thread, since a store in a process that has been stopped never answers: that of the first rank."""
    found, has_asked = [0], threading.Event()
    store, rank, num_ranks = group.get_group_store(), group.rank(), group.size()

    def ask() -> None:
        with suppress(dist.DistError):  # the store is gone
            present = _who_says("gave up", store, rank, range(num_ranks))
            found[:] = [other for other in range(num_ranks) if other not in present]
            # The store ends with the first rank, which so waits until the others have read it.
            _who_says("has read", store, rank, present)
        has_asked.set()

    threading.Thread(target=ask, daemon=True).start()
    has_asked.wait(2 * GRACE_S)
    return found


def _who_says(what: str, store: dist.Store, rank: int, among: Iterable[int]) -> list[int]:
    """Say it, and give the others GRACE_S to. DistError: the store is gone."""
    store.set(f"{what}/{rank}", "")
    until, found = time.monotonic() + GRACE_S, []
    for other in among:
        while not (is_said := store.check([f"{what}/{other}"])) and time.monotonic() < until:
            time.sleep(0.05)
        found += [other] if is_said else []
    return found
