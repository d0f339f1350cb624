"""The processes of a run: what they tell each other, and how they fail together."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..parallel.distribute import gradient_norm
from ..parallel.gradients import GradientSums
from ..parallel.meshes import DATA, EXPERT, in_copies, in_nodes
from ..parallel.placement import split
from ..parallel.sums import sum_over_ranks
from .gradients import gradients_of
from .meeting import number_of, open_store, wait_for_all
from .parts import Share
from .strict_json import Json, parse_json, to_json_bytes

Sums = TypeVar("Sums")
Result = TypeVar("Result")

# How often a rank that works by itself tells the others that it lives.
_BEAT_S = 1.0


class ToldElsewhere(ValueError):
    """What failed on another rank, or is told there: this one has nothing to add."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of a run.

    mesh: of one dimension, "expert"; None: it is alone. copies: the same ranks as "data" x "expert", where
    the experts have several copies. nodes: those that share a copy, by node, where tokens are to cross once
    between these; None: they go straight to ranks. gradient_group: the same ranks as the mesh's once more,
    for sums that begin while tokens travel; None: gradients are not added up by these. timeout_s: how long
    they wait for each other; None: as long as torch does.

    Every method is called by all ranks together.
    """

    rank: int
    num_ranks: int
    mesh: DeviceMesh | None
    copies: DeviceMesh | None = None
    nodes: DeviceMesh | None = None
    gradient_group: dist.ProcessGroup | None = None
    timeout_s: float | None = None

    @staticmethod
    def of_mesh(
        mesh: DeviceMesh, *, gradient_group: dist.ProcessGroup | None = None, timeout_s: float | None = None
    ) -> "Ranks":
        return Ranks(
            rank=mesh.get_local_rank(),
            num_ranks=mesh.size(),
            mesh=mesh,
            gradient_group=gradient_group,
            timeout_s=timeout_s,
        )

    def with_copies(self, number: int) -> "Ranks":
        """The same ranks, that have so many copies of the experts. ValueError, on all: they cannot."""
        if self.num_ranks % number:
            raise ValueError(
                f"training.expert-copies ({number}) must divide the number of processes ({self.num_ranks}); "
                "start as many as that takes, or give fewer copies"
            )
        if self.mesh is None or number == 1:
            return self
        return replace(self, copies=in_copies(self.mesh, copies=number, timeout=self._timeout))

    def over_nodes(self, environment: Mapping[str, str]) -> "Ranks":
        """The same ranks, with the nodes that the launcher tells of. ValueError: these differ in size."""
        name = "LOCAL_WORLD_SIZE"
        per_node = int(environment.get(name, self.num_ranks))
        self.require_same({name: per_node})
        sharing = self.share.num_ranks
        with self.together():
            if sharing % per_node and per_node % sharing:
                raise ValueError(
                    f"{name} ({per_node}) must divide the number of processes that share the experts "
                    f"({sharing}), or be a multiple of it, with training.exchange by_node; start equally "
                    "many on each machine, or leave it direct"
                )
        if self.expert_mesh is None or per_node == 1 or per_node >= sharing:
            return self
        nodes = in_nodes(self.expert_mesh, ranks_per_node=per_node, timeout=self._timeout)
        return replace(self, nodes=nodes)

    @property
    def expert_mesh(self) -> DeviceMesh | None:
        """That the experts are spread over, with "data" where they have copies."""
        return self.mesh if self.copies is None else self.copies

    @property
    def share(self) -> Share:
        """This rank's place among those that share the experts."""
        if self.copies is None:
            return Share(rank=self.rank, num_ranks=self.num_ranks)
        return Share(rank=self.copies.get_local_rank(EXPERT), num_ranks=self.copies[EXPERT].size())

    @property
    def has_first_copy(self) -> bool:
        """Whether this is one of those that write the experts."""
        return self.copies is None or self.copies.get_local_rank(DATA) == 0

    @property
    def of_own_copy(self) -> list[int]:
        """The ranks that this one shares the experts with."""
        if self.copies is None:
            return [*range(self.num_ranks)]
        return self.copies[EXPERT].mesh.tolist()

    @property
    def _timeout(self) -> timedelta | None:
        return None if self.timeout_s is None else timedelta(seconds=self.timeout_s)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def rows(self, num_rows: int) -> range:
        """This rank's rows of a batch: consecutive, as even as they can be, perhaps none."""
        return split(num_rows, self.num_ranks)[self.rank]

    def total(self, sums: Sums) -> Sums:
        """Added up over the ranks; its gradient is the rank's own, as `sum_over_ranks` tells."""
        return sums if self.mesh is None else sum_over_ranks(sums, self.mesh.get_group())

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the ranks, in float64."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.mesh.device_type)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total.tolist()

    def of_first(self, value: float) -> float:
        """The first rank's number."""
        return self.sum(value if self.is_first else 0.0)[0]

    def adding_up_gradients(self, model: nn.Module) -> AbstractContextManager[None]:
        """Leave in `.grad` those of the sum of the ranks' losses, after a block with the last backward."""
        if self.expert_mesh is None:
            return nullcontext()
        assert self.gradient_group is not None
        return GradientSums(model, self.expert_mesh, self.gradient_group).overlap()

    def gradient_norm(self, model: nn.Module) -> float:
        """The global norm of these."""
        if self.expert_mesh is not None:
            return gradient_norm(model, self.expert_mesh).item()
        return nn.utils.get_total_norm(gradients_of(model)).item()

    def tell_all(self, value: Json) -> list[Json]:
        """Each rank's value, in the order of the ranks."""
        if self.mesh is None:
            return [value]
        data = torch.frombuffer(bytearray(to_json_bytes(value, name="value")), dtype=torch.uint8)
        return [parse_json(text.numpy().tobytes()) for text in self.gather(data)]

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Each rank's rows, in the order of the ranks, on the CPU. Their number alone may differ."""
        if self.mesh is None:
            return [rows.cpu()]
        group, device = self.mesh.get_group(), self.mesh.device_type
        sizes_W1 = torch.zeros(self.num_ranks, 1, dtype=torch.int64, device=device)
        dist.all_gather(list(sizes_W1), torch.tensor([len(rows)], device=device), group=group)
        sizes = sizes_W1.flatten().tolist()
        padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return [part[:size].cpu() for part, size in zip(parts, sizes, strict=True)]

    def agree(self, word: str) -> str:
        """The word of the first rank that has one; "" for none."""
        if self.mesh is None or not self.sum(float(bool(word)))[0]:
            return word
        return next(str(each) for each in self.tell_all(word) if each)

    def however_long(self, work: Callable[[], Result]) -> Result:
        """Do work that waits for no other rank, such as reading files, and wait until all have done theirs.

        There is no limit to that, as long as all ranks live; one that is killed or stopped ends the run as
        ever. The work is done in another thread.
        """
        if self.mesh is None:
            return work()
        done = in_a_thread(work)
        while self.sum(float(not wait([done], timeout=_BEAT_S).done))[0]:
            pass
        return done.result()

    def beside(self) -> "Ranks":
        """The same ranks once more, to be called by another thread while this one calls these. On the CPU.

        They end with the engine's process group. They know which experts they have, and compute nothing.
        """
        if self.mesh is None:
            return self
        group = dist.new_group(
            dist.get_process_group_ranks(self.mesh.get_group()),
            backend="gloo",
            timeout=self._timeout,
            use_local_synchronization=True,
        )
        assert isinstance(group, dist.ProcessGroup)
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(EXPERT,))
        return replace(self, mesh=mesh, nodes=None, gradient_group=None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank within the block fails on all after it: the first rank tells of it.

        In the block no rank waits for one that may have failed. ValueError and OSError alone; another kind
        ends its process, and the launcher the others.
        """
        problem: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            problem = error
        if self.mesh is None:
            if problem is not None:
                raise problem
            return
        said = self.tell_all("" if problem is None else str(problem) or type(problem).__name__)
        failed = {rank: str(words) for rank, words in enumerate(said) if words}
        if failed and not self.is_first:
            raise ToldElsewhere(said[self.rank] or "told by rank 0")
        if problem is not None:
            raise problem
        for rank, words in failed.items():
            raise ValueError(f"rank {rank}: {words}")

    def require_same(self, values: dict[str, Json]) -> None:
        """Refuse what must be the same everywhere and is not, by its name and the ranks."""
        given = self.tell_all(values)
        with self.together():
            for rank, others in enumerate(given):
                assert isinstance(others, dict)
                for name in values | others:
                    if self.is_first and others.get(name) != values.get(name):
                        raise ValueError(
                            f"{name} ({others.get(name)} on rank {rank}, {values.get(name)} on rank 0) must "
                            "be the same on all ranks; give them the same command and the same files"
                        )


ALONE = Ranks(rank=0, num_ranks=1, mesh=None)


def in_a_thread(work: Callable[[], Result]) -> "Future[Result]":
    """Begin work that may be left alone when the process ends."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    return outcome


@contextmanager
def ranks_of_process(device: torch.device, *, timeout_s: float) -> Iterator[Ranks]:
    """This process's place among those that `torchrun` started; alone where it started none.

    timeout_s: how long a rank waits for the others before the run ends; at the beginning two fifths of it.

    ValueError: ranks that did not come, or an environment in which the launcher could not do what it is asked
    to.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    rank, num_ranks = (number_of(os.environ, name) for name in ("RANK", "WORLD_SIZE"))
    patience_s = 0.4 * timeout_s  # of the default 100 s: all end within a minute, starting included
    with _told_by_first(rank):
        _require_restartable(os.environ)
    store = open_store(os.environ, within_s=patience_s)
    with _told_by_first(rank):
        wait_for_all(store, rank=rank, num_ranks=num_ranks, within_s=patience_s)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        store=store,
        rank=rank,
        world_size=num_ranks,
    )
    try:
        mesh = init_device_mesh(device.type, (num_ranks,), mesh_dim_names=(EXPERT,))
        gradient_group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        assert isinstance(gradient_group, dist.ProcessGroup)
        # NCCL connects at a group's first collective, which is not to be amid a backward pass.
        dist.barrier(gradient_group)
        yield Ranks.of_mesh(mesh, gradient_group=gradient_group, timeout_s=timeout_s)
    finally:
        dist.destroy_process_group()


@contextmanager
def _told_by_first(rank: int) -> Iterator[None]:
    """What all ranks find wrong is said by one."""
    try:
        yield
    except ValueError as error:
        raise (ToldElsewhere(str(error)) if rank else error) from None


def _require_restartable(environment: Mapping[str, str]) -> None:
    """torchrun that restarts needs another rendezvous for each attempt, or the second one never meets."""
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    if int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) and environment.get(name) != "1":
        raise ValueError(
            f"{name} ({environment.get(name, 'not set')}) must be 1 with torchrun --max-restarts, or the "
            f"ranks cannot meet again: {name}=1 torchrun ..."
        )
