"""A run of many ranks without any: each rank's share is made in turn, on the meta device, in one process.

Torch's fake process group says that there are others. Nothing is allocated, and nothing travels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..models import LayeredModel
from ..models.memory import Memory
from ..parallel.expert_parallel import ExpertParallel
from ..parallel.placement import firsts
from .config import RunConfig
from .making import make_model, with_optimizers
from .ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was found. Bytes are those of the rank that holds most."""

    ranks: int = field(metadata={"doc": "ranks, each made in turn"})
    experts: int = field(metadata={"doc": "experts, each on exactly one of them"})
    fewest_experts: int = field(metadata={"doc": "fewest experts on a rank"})
    most_experts: int = field(metadata={"doc": "most experts on a rank"})
    weights: int = field(metadata={"doc": "bytes of weights"})
    gradients: int = field(metadata={"doc": "bytes of gradients"})
    optimizer: int = field(metadata={"doc": "bytes of optimizer state"})

    def require(self, planned: Memory) -> None:
        """ValueError where bytes are not as planned."""
        for name in ("weights", "gradients", "optimizer"):
            if getattr(self, name) != getattr(planned, name):
                raise ValueError(
                    f"{name}: a rank has {getattr(self, name):,} bytes, where {getattr(planned, name):,} are "
                    "planned; the plan is wrong"
                )


def dry_run(config: RunConfig, *, num_ranks: int) -> DryRun:
    """Make what every rank would hold, and look that each expert is on the one rank that tokens go to.

    ValueError: the run is not for so many ranks, or has gradients whose size depends on the text.
    """
    if config.optim.tables == "rows":
        raise ValueError("optim.tables (rows): gradients depend on the text; make the dry run with adam")
    held: dict[str, list[int]] = {}
    most = (0, 0, 0)
    for rank in range(num_ranks):
        with fake_rank(rank, num_ranks) as ranks:
            ranks = ranks.with_copies(config.training.expert_copies)
            model = make_model(config, ranks, device=torch.device("meta"))
            for name, number in experts_held(model).items() if ranks.has_first_copy else ():
                held.setdefault(name, []).append(number)
            weights = _bytes(model.parameters())
            if weights > most[0]:
                most = (weights, *_bytes_of_step(model, config))
    for name, numbers in held.items():
        require_one_rank_each(name, numbers)
    on_rank = [sum(numbers) for numbers in zip(*held.values(), strict=True)] or [0]
    return DryRun(
        ranks=num_ranks,
        experts=sum(on_rank),
        fewest_experts=min(on_rank),
        most_experts=max(on_rank),
        weights=most[0],
        gradients=most[1],
        optimizer=most[2],
    )


@contextmanager
def fake_rank(rank: int, num_ranks: int) -> Iterator[Ranks]:
    """This process as one of many that are not there: collectives return at once, and do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield Ranks.of_mesh(init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("expert",)))
    finally:
        dist.destroy_process_group()


def experts_held(model: LayeredModel) -> dict[str, int]:
    """How many experts of each mixture there are in a rank's model, by its tensors."""
    return {
        name: int(next(module.parameters()).shape[0])
        for name, module in model.named_modules()
        if isinstance(module, ExpertParallel)
    }


def require_one_rank_each(name: str, held: list[int]) -> None:
    """Refuse a layer of which a token would be sent to a rank without its expert. held: by rank."""
    num_experts = sum(held)
    first_W1 = firsts(num_experts, len(held), device=torch.device("cpu"))
    asked_W = first_W1.diff().tolist()
    for rank, (asked, there) in enumerate(zip(asked_W, held, strict=True)):
        if asked != there:
            raise ValueError(f"{name}: tokens for {asked} experts go to rank {rank}, which holds {there}")


def _bytes_of_step(model: LayeredModel, config: RunConfig) -> tuple[int, int]:
    """Of gradients, and of the optimizers' state without their counts of steps, which Adam makes late."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state = with_optimizers(model, config)
    for optimizer in state.optimizers:
        if not optimizer.state:
            optimizer.step()
    kept = [values for optimizer in state.optimizers for values in optimizer.state.values()]
    return (
        _bytes(p.grad for p in model.parameters() if p.grad is not None),
        _bytes(tensor for values in kept for name, tensor in values.items() if name != "step"),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
