"""A mixture whose experts are spread over ranks, and the same mixture in one process."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss, switch_loss, threshold_loss, z_loss
from sparsegate.moe.routing import BalanceSums
from sparsegate.parallel.expert_parallel import ExpertParallel
from sparsegate.parallel.placement import experts_of
from sparsegate.parallel.sums import sum_over_ranks
from tests.helpers.moe_cases import EXPERTS, GATES, WIDTH, a_gate, some_experts


@dataclass(frozen=True)
class Case:
    """sizes: number of tokens of each rank. masked: some tokens are padding."""

    gate: str
    experts: str
    sizes: tuple[int, ...]
    masked: bool = False
    training: bool = True
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.gate}-{self.experts}-{'+'.join(map(str, self.sizes))}"

    @property
    def num_ranks(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Part:
    """The tokens of one rank."""

    x_TD: Tensor
    mask_T: Tensor | None
    noise: Tensor | None
    cotangent_TD: Tensor


@dataclass
class Found:
    """What a rank has computed; gradients of the experts are of those that it has."""

    y_TD: Tensor
    loss: Tensor
    grad_x_TD: Tensor
    gate: dict[str, Tensor]
    experts: dict[str, Tensor]
    sums: BalanceSums


def build(case: Case) -> MoE:
    """The same layer on every rank."""
    torch.manual_seed(5 + case.seed)
    return MoE(gate=a_gate(case.gate), experts=some_experts(case.experts)).train(case.training)


def parts(case: Case, moe: MoE) -> list[Part]:
    """The global batch, rank by rank."""
    torch.manual_seed(6 + case.seed)
    total = sum(case.sizes)
    whole = Part(
        x_TD=torch.randn(total, WIDTH, dtype=torch.float64),
        mask_T=torch.rand(total) < 0.7 if case.masked else None,
        noise=torch.randn(total, moe.gate.noise_width, dtype=torch.float64) if moe.gate.noise_width else None,
        cotangent_TD=torch.randn(total, WIDTH, dtype=torch.float64),
    )
    split = {
        name: [None] * case.num_ranks if value is None else value.split(case.sizes)
        for name, value in vars(whole).items()
    }
    return [Part(**{name: split[name][rank] for name in split}) for rank in range(case.num_ranks)]


def forward(moe: MoE, part: Part, rank: int) -> tuple[Tensor, Tensor, BalanceSums]:
    """The leaf, the output, and the sums; draws that the gate makes by itself are the rank's."""
    x_TD = part.x_TD.clone().requires_grad_()
    torch.manual_seed(100 + rank)
    y_TD, routing = moe(x_TD, part.mask_T, part.noise)
    return x_TD, y_TD, routing.sums


def balance(total: BalanceSums) -> Tensor:
    return (
        importance_loss(total)
        + load_loss(total)
        + switch_loss(total)
        + 0.1 * z_loss(total)
        + threshold_loss(total)
    )


def spread(moe: MoE, mesh: DeviceMesh) -> MoE:
    """The layer with this rank's experts alone."""
    own = experts_of(mesh.get_local_rank(), num_experts=moe.experts.num_experts, num_ranks=mesh.size())
    return MoE(
        gate=moe.gate,
        experts=ExpertParallel(
            experts=moe.experts.part(own.start, own.stop), num_experts=moe.experts.num_experts, mesh=mesh
        ),
    ).train(moe.training)


def step_of_a_rank(mesh: DeviceMesh, case: Case) -> Found:
    """Forward and backward of this rank's tokens; the gate's gradients are those of the rank."""
    rank, whole = mesh.get_local_rank(), build(case)
    moe = spread(whole, mesh)
    part = parts(case, whole)[rank]
    x_TD, y_TD, sums = forward(moe, part, rank)
    total = sum_over_ranks(sums, mesh.get_group())
    task = (y_TD * part.cotangent_TD).sum() / sum(case.sizes)
    (task + balance(total)).backward()
    return Found(
        y_TD=y_TD.detach(),
        loss=task.detach(),
        grad_x_TD=x_TD.grad,
        gate=gradients_of(moe.gate),
        experts=gradients_of(moe.experts.experts),
        sums=replace(total, **{name: value.detach() for name, value in vars(total).items()}),
    )


def one_process(case: Case, *, joined: bool) -> Found:
    """The oracle. joined: one call with all tokens; else one for each rank's, and the sums added."""
    moe = build(case)
    given = parts(case, moe)
    if joined:
        given = [
            Part(
                **{
                    n: None if v is None else torch.cat([vars(p)[n] for p in given])
                    for n, v in vars(given[0]).items()
                }
            )
        ]
    calls = [forward(moe, part, rank) for rank, part in enumerate(given)]
    sums = calls[0][2]
    for _, _, more in calls[1:]:
        sums = sums + more
    y_TD = torch.cat([y_TD for _, y_TD, _ in calls])
    task = (y_TD * torch.cat([part.cotangent_TD for part in given])).sum() / sum(case.sizes)
    (task + balance(sums)).backward()
    return Found(
        y_TD=y_TD.detach(),
        loss=task.detach(),
        grad_x_TD=torch.cat([x_TD.grad for x_TD, _, _ in calls]),
        gate=gradients_of(moe.gate),
        experts=gradients_of(moe.experts),
        sums=sums,
    )


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """By name; of a parameter that nothing depends on, zeros."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


ALL_GATES, ALL_EXPERTS = list(GATES), list(EXPERTS)
