"""A layer on several ranks, spawned: what each process runs, and the tokens that it is given."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss
from sparsegate.moe.routing import BalanceSums
from tests.helpers.moe_cases import NUM_EXPERTS, WIDTH, Batch, a_moe, some_experts

WORLD_SIZE = 2


class Case(NamedTuple):
    """Which experts, and how many of the tokens the first rank is given; the second has the rest."""

    kind: str
    cut: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.cut}"


def build(kind: str) -> MoE:
    """The same layer on every rank."""
    torch.manual_seed(5)
    moe = a_moe()
    return moe if kind == "feed_forward" else MoE(gate=moe.gate, experts=some_experts(kind))


def whole_batch() -> Batch:
    """Twelve tokens; the noise keeps them away from experts 3 to 5, that receive nothing."""
    torch.manual_seed(6)
    noise_TE = torch.randn(12, NUM_EXPERTS, dtype=torch.float64)
    noise_TE[:, 3:] = -1e3
    return Batch(
        torch.randn(12, WIDTH, dtype=torch.float64),
        noise_TE,
        torch.randn(12, WIDTH, dtype=torch.float64),
    )


def loss_of(moe: nn.Module, batch: Batch, *, others: BalanceSums | None) -> tuple[Tensor, BalanceSums]:
    """The task summed over these tokens, and the balance losses at the sums of these and the others'."""
    y_TD, routing = moe(batch.x_TD, None, batch.noise_TE)
    total = routing.sums if others is None else routing.sums + others
    task = (y_TD * batch.cotangent_TD).sum()
    return task + importance_loss(total) + load_loss(total), routing.sums


def _of_the_others(sums: BalanceSums) -> BalanceSums:
    """What all other ranks add to the whole, as numbers."""
    fields = {name: value.detach().clone() for name, value in vars(sums).items()}
    for name, own in fields.items():
        total = own.clone()
        dist.all_reduce(total)
        fields[name] = total - own
    return BalanceSums(**fields)


def _gradients_of_one_rank(rank: int, case: Case) -> dict[str, Tensor]:
    own = Batch(*(t[: case.cut] if rank == 0 else t[case.cut :] for t in whole_batch()))
    moe = build(case.kind)
    _, sums = loss_of(moe, own, others=None)
    parallel = nn.parallel.DistributedDataParallel(moe)
    loss, _ = loss_of(parallel, own, others=_of_the_others(sums))
    (loss * WORLD_SIZE).backward()  # gradients are to be added up, and this wrapper takes their mean
    return {name: p.grad for name, p in moe.named_parameters()}


def _run_rank(rank: int, cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    for case in cases:
        save_file(_gradients_of_one_rank(rank, case), Path(folder, f"{case}-{rank}.safetensors"))
    dist.destroy_process_group()


def gradients_on_ranks(cases: list[Case], folder: Path) -> dict[Case, list[dict[str, Tensor]]]:
    """Each rank's gradients after the exchange, for each case."""
    mp.spawn(_run_rank, (cases, str(folder)), nprocs=WORLD_SIZE)
    return {
        case: [load_file(folder / f"{case}-{rank}.safetensors") for rank in range(WORLD_SIZE)]
        for case in cases
    }
