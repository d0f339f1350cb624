"""How the processes of a run meet, and who is told to be missing where they do not."""

import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

_CURE = "start all ranks, by one torchrun command on each machine"
# torch asks a store that does not answer for up to twice as long as it is told.
_TRY_S = 5.0


def open_store(environment: Mapping[str, str], *, within_s: float) -> dist.Store:
    """Where the ranks that a launcher started find each other.

    ValueError: nobody answers there, or the launcher does not say where.
    """
    rank, num_ranks, port = (number_of(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = environment.get("MASTER_ADDR", "")
    # torchrun's agent keeps the store, unless it was told to leave that to the first rank.
    kept_by_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not kept_by_agent
    until = time.monotonic() + within_s
    while True:
        try:
            store = dist.TCPStore(
                host,
                port,
                world_size=num_ranks,
                is_master=is_master,
                timeout=timedelta(seconds=min(_TRY_S, within_s)),
                wait_for_workers=False,
                multi_tenant=True,
            )
            break
        except dist.DistError as error:
            if not is_master and time.monotonic() + 2 * _TRY_S < until:
                continue
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"MASTER_ADDR:MASTER_PORT ({host}:{port}): rank {rank} of {num_ranks} cannot meet the others "
                f"there ({reason}); {_CURE}"
            ) from error
    store.set_timeout(timedelta(seconds=within_s))
    return dist.PrefixStore(f"sparsegate/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def wait_for_all(store: dist.Store, *, rank: int, num_ranks: int, within_s: float) -> None:
    """Return when all ranks are there. ValueError: some did not come in time; it says which."""
    until = time.monotonic() + within_s
    try:
        store.set(f"here/{rank}", "")
        store.add("here", 1)
        while store.add("here", 0) < num_ranks:
            if time.monotonic() > until:
                missing = [other for other in range(num_ranks) if not store.check([f"here/{other}"])]
                raise ValueError(
                    f"WORLD_SIZE ({num_ranks}): rank {', '.join(map(str, missing))} did not come within "
                    f"{within_s:g} s; {_CURE}"
                )
            time.sleep(0.02)
    except dist.DistError as error:
        raise ValueError(f"WORLD_SIZE ({num_ranks}): rank 0 left before all were there; {_CURE}") from error


def number_of(environment: Mapping[str, str], name: str) -> int:
    """A number that the launcher tells. ValueError: it does not."""
    value = environment.get(name, "not set")
    if not value.isdecimal():
        raise ValueError(f"{name} ({value}) must be a number, which torchrun sets: {_CURE}")
    return int(value)
