"""A mixture whose experts are spread over ranks, and the same mixture in one process."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from sparsegate.moe.layer import MoE
from sparsegate.moe.losses import importance_loss, load_loss, switch_loss, threshold_loss, z_loss
from sparsegate.moe.routing import BalanceSums
from sparsegate.parallel import expert_parallel
from sparsegate.parallel.expert_parallel import ExpertParallel
from sparsegate.parallel.gathered import Gathered
from sparsegate.parallel.meshes import in_nodes
from sparsegate.parallel.placement import experts_of
from sparsegate.parallel.sums import sum_over_ranks
from tests.helpers.moe_cases import EXPERTS, GATES, NUM_EXPERTS, WIDTH


@dataclass(frozen=True)
class Case:
    """sizes: number of tokens of each rank. masked: some tokens are padding. per_node: ranks on each node.

    num_pieces: that travel one after the other.
    """

    gate: str
    experts: str
    sizes: tuple[int, ...]
    masked: bool = False
    training: bool = True
    gathered: bool = False
    seed: int = 0
    num_experts: int = NUM_EXPERTS
    favour: float = 0.0  # of the first experts, over the last ones
    recompute: str = ""
    dtype: torch.dtype = torch.float64
    per_node: int | None = None
    num_pieces: int = 1

    def __str__(self) -> str:
        return f"{self.gate}-{self.num_experts}-{self.experts}-{'+'.join(map(str, self.sizes))}"

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
    kind = {"width": WIDTH, "num_experts": case.num_experts, "dtype": case.dtype}
    gate, experts = GATES[case.gate](**kind), EXPERTS[case.experts](**kind)
    for name, parameter in gate.named_parameters():
        torch.nn.init.normal_(parameter, mean=-2.0 if name.endswith("log_threshold") else 0.0, std=0.5)
    with torch.no_grad():
        for weight in [gate.w_gate] if case.favour else []:
            weight[0] -= case.favour * torch.arange(case.num_experts)  # also of negative inputs
    if case.recompute == "of the experts":
        experts.recompute = True
    return MoE(gate=gate, experts=experts).train(case.training)


def parts(case: Case, moe: MoE) -> list[Part]:
    """The global batch, rank by rank."""
    torch.manual_seed(6 + case.seed)
    total = sum(case.sizes)
    whole = Part(
        x_TD=torch.randn(total, WIDTH, dtype=torch.float64).to(case.dtype),
        mask_T=torch.rand(total) < 0.7 if case.masked else None,
        noise=torch.randn(total, moe.gate.noise_width, dtype=torch.float64) if moe.gate.noise_width else None,
        cotangent_TD=torch.randn(total, WIDTH, dtype=torch.float64).to(case.dtype),
    )
    split = {
        name: [None] * case.num_ranks if value is None else value.split(case.sizes)
        for name, value in vars(whole).items()
    }
    return [Part(**{name: split[name][rank] for name in split}) for rank in range(case.num_ranks)]


def random_case(seed: int, *, fewest_ranks: int = 1) -> Case:
    """Few tokens on few ranks, on many of them none; experts that receive nothing anywhere."""
    draw = random.Random(seed)
    num_ranks = draw.randint(fewest_ranks, 4)
    return Case(
        draw.choice(["noisy_topk", "topk", "sigmoid"]),
        draw.choice(["feed_forward", "modules"]),
        tuple(draw.choice([0, 0, 1, 2, draw.randint(3, 40)]) for _ in range(num_ranks)),
        masked=draw.random() < 0.3,
        seed=seed,
        num_experts=draw.randint(max(2, num_ranks), 11),
        favour=draw.choice([0.0, 3.0, 50.0]),
        num_pieces=draw.choice([1, 1, 2, 3]),
    )


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


by_node = cache(in_nodes)  # the groups are made once


def spread(moe: MoE, mesh: DeviceMesh, case: Case) -> MoE:
    """The layer with this rank's experts alone."""
    own = experts_of(mesh.get_local_rank(), num_experts=moe.experts.num_experts, num_ranks=mesh.size())
    return MoE(
        gate=Gathered(moe.gate, mesh=mesh) if case.gathered else moe.gate,
        experts=ExpertParallel(
            experts=moe.experts.part(own.start, own.stop),
            num_experts=moe.experts.num_experts,
            mesh=mesh if case.per_node is None else by_node(mesh, ranks_per_node=case.per_node),
            num_pieces=case.num_pieces,
        ),
    ).train(moe.training)


def step_of_a_rank(mesh: DeviceMesh, case: Case) -> Found:
    """Forward and backward of this rank's tokens; the gate's gradients are those of the rank."""
    rank, whole = mesh.get_local_rank(), build(case)
    moe = spread(whole, mesh, case)
    part = parts(case, whole)[rank]
    x_TD, y_TD, sums = forward(recomputed(moe) if case.recompute == "of the layer" else moe, part, rank)
    total = sum_over_ranks(sums, mesh.get_group())
    task = (y_TD * part.cotangent_TD).sum() / sum(case.sizes)
    (task + balance(total)).backward()
    return Found(
        y_TD=y_TD.detach(),
        loss=task.detach(),
        grad_x_TD=x_TD.grad,
        gate=gradients_of(whole.gate),
        experts=gradients_of(moe.experts.experts),
        sums=replace(total, **{name: value.detach() for name, value in vars(total).items()}),
    )


def recomputed(moe: MoE) -> Callable[..., Any]:
    return lambda *given: checkpoint(moe, *given, use_reentrant=False)


def rows_sent_by_a_rank(mesh: DeviceMesh, case: Case) -> list[int]:
    """Rows as wide as a token in each collective, in the order of the collectives."""
    sent, collective = [], dist.all_to_all_single

    def counting(into, tensor, *rest, **options):
        if tensor.shape[1:] == (WIDTH,):
            sent.append(len(tensor))
        return collective(into, tensor, *rest, **options)

    with mock.patch.object(dist, "all_to_all_single", counting):
        step_of_a_rank(mesh, case)
    return sent


def bytes_between_nodes(mesh: DeviceMesh, case: Case, per_node: int) -> int:
    """What a rank sends to other nodes, of `per_node` ranks each, in a forward and a backward pass."""
    total, collective = [], dist.all_to_all_single
    own = mesh.get_local_rank() // per_node

    def counting(into, tensor, received=None, sent=None, *, group, **options):
        members = dist.get_process_group_ranks(group)
        parts = tensor.split(sent) if sent else tensor.chunk(len(members))
        total.extend(part.nbytes for part, to in zip(parts, members, strict=True) if to // per_node != own)
        return collective(into, tensor, received, sent, group=group, **options)

    spread(build(case), mesh, case)  # its groups are there before
    with mock.patch.object(dist, "all_to_all_single", counting):
        step_of_a_rank(mesh, case)
    return sum(total)


class Watched:
    """A collective that tells when it is waited for."""

    def __init__(self, work: dist.Work, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def events_of_a_rank(mesh: DeviceMesh, case: Case) -> tuple[list[str], list[str]]:
    """In forward and in backward: when rows set out, when they are waited for, when experts compute."""
    events, collective = [], dist.all_to_all_single
    rank, whole = mesh.get_local_rank(), build(case)
    moe, part = spread(whole, mesh, case), parts(case, whole)[rank]
    experts = moe.experts.experts
    compute = experts.forward

    def watched(into, tensor, *given, **options):
        work = collective(into, tensor, *given, **options)
        if not tensor.is_floating_point() or tensor.shape[1:] != (WIDTH,):  # counts and weights
            return work
        events.append("send")
        return Watched(work, events)

    def computed(rows_RD, routing):
        events.append("compute")
        y_RD = compute(rows_RD, routing)
        y_RD.register_hook(lambda grad: events.append("compute"))
        return y_RD

    with (
        mock.patch.object(dist, "all_to_all_single", watched),
        mock.patch.object(experts, "forward", computed),
    ):
        _, y_TD, _ = forward(moe, part, rank)
        forth, events = events, []
        y_TD.sum().backward()
    return forth, events


def host_waits_of_a_rank(mesh: DeviceMesh, case: Case) -> int:
    """How often a forward pass turns tensors into numbers of the host."""
    rank, whole = mesh.get_local_rank(), build(case)
    moe, part = spread(whole, mesh, case), parts(case, whole)[rank]
    routing, waits = moe.gate(part.x_TD, part.mask_T, part.noise), []

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor, *given, **options: waits.append(method) or method(tensor, *given, **options)

    with ExitStack() as stack:
        for name in ("tolist", "item", "nonzero", "__int__", "__bool__", "__index__", "__float__"):
            stack.enter_context(mock.patch.object(Tensor, name, counted(getattr(Tensor, name))))
        # The experts themselves may wait, on a CPU.
        stack.enter_context(mock.patch.object(moe.experts.experts, "forward", lambda x_RD, _: x_RD))
        moe.experts(part.x_TD, routing)
    return len(waits)


def step_with_wrong_counts(mesh: DeviceMesh, case: Case, who: int, where: str, by: int) -> tuple[str, int]:
    """What a rank says, and how many tensors of rows moved, when `by` is added to a count of rank `who`.

    where: "counting", or "on the way" to the others.
    """
    moved, collective, departure = [], dist.all_to_all_single, expert_parallel.depart
    is_culprit = mesh.get_local_rank() == who

    def count_wrong(*given, **options):
        found = departure(*given, **options)
        if is_culprit and where == "counting":
            found.rows_PW[0, -1] += by
        return found

    def send(into, tensor, *rest, **options):
        is_of_counts = tensor.dtype == torch.int64
        if is_of_counts and is_culprit and where == "on the way":
            tensor = tensor.clone()
            tensor[:, 0] += by
        moved.extend([] if is_of_counts else [tensor])
        return collective(into, tensor, *rest, **options)

    with (
        mock.patch.object(expert_parallel, "depart", count_wrong),
        mock.patch.object(dist, "all_to_all_single", send),
    ):
        try:
            step_of_a_rank(mesh, case)
        except RuntimeError as error:
            return str(error), len(moved)
    return "nothing", len(moved)


def routing_of_a_rank(mesh: DeviceMesh, case: Case) -> tuple[int, int]:
    """Number of used pairs, of the rank's own and by its sums, with draws of the gate's own."""
    rank, whole = mesh.get_local_rank(), build(case)
    gate = spread(whole, mesh, case).gate
    torch.manual_seed(100 + rank)
    routing = gate(parts(case, whole)[rank].x_TD)
    num_used = (routing.expert_N < routing.num_experts).sum()
    return int(num_used), int(routing.sums.count_E.sum() - routing.sums.num_dropped)


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
