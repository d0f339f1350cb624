"""Gradients that ranks add up: of a small language model, and of layers that each rank uses otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.models import LanguageModel
from sparsegate.parallel.distribute import spread_experts
from sparsegate.parallel.gradients import GradientSums
from sparsegate.parallel.sums import sum_over_ranks
from tests.helpers.ranks import gradient_group
from tests.helpers.spread_models import Case, a_batch, a_model, balance, loss_sums

WIDTH, NUM_LAYERS = 4, 4


def gradients_of_a_rank(mesh: DeviceMesh, case: Case, bucket_bytes: int, when: str) -> list[Tensor]:
    """Of all parameters. when: the sums may begin: "in backward", or "after" it."""
    model, loss = _loss_of_a_rank(mesh, case)
    sums = GradientSums(model, mesh, gradient_group(mesh.size()), bucket_bytes=bucket_bytes)
    if when == "after":
        loss.backward()
    with sums.overlap():
        if when == "in backward":
            loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def are_alike(mesh: DeviceMesh, case: Case, bucket_bytes: int) -> bool:
    """Whether sums that begin in the backward pass are those after it bit for bit, and twice the same."""
    whens = ("in backward", "in backward", "after")
    once, again, after = (gradients_of_a_rank(mesh, case, bucket_bytes, when) for when in whens)
    return all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, again, after, strict=True))


def events_of_a_rank(mesh: DeviceMesh, case: Case) -> list[str]:
    """What happens in the block: "rows" set out, a "sum" begins, the backward pass has "ended"."""
    model, loss = _loss_of_a_rank(mesh, case)
    sums = GradientSums(model, mesh, gradient_group(mesh.size()), bucket_bytes=512)
    events = []

    def told(event: str, collective: Any) -> Any:
        return lambda *given, **options: events.append(event) or collective(*given, **options)

    with (
        mock.patch.object(dist, "all_reduce", told("sum", dist.all_reduce)),
        mock.patch.object(dist, "all_to_all_single", told("rows", dist.all_to_all_single)),
        sums.overlap(),
    ):
        loss.backward()
        events.append("ended")
    return events


@dataclass
class Added:
    """own: of this rank alone; none where nothing depends on a parameter. total: what the sums left."""

    own: list[Tensor | None]
    total: list[Tensor | None]


def added_by_a_rank(
    mesh: DeviceMesh, passes: Sequence[Sequence[Sequence[int]]], frozen: int | None = None
) -> Added:
    """Of layers, one after the other, each in a bucket of its own.

    passes: of each rank, the layers that its micro-batches go through, in this order; a rank may leave some
    out, or have a pass of none. frozen: a layer that is not trained.
    """
    layers, alone = (_layers(frozen) for _ in range(2))
    sums = GradientSums(layers, mesh, gradient_group(mesh.size()), bucket_bytes=1)
    *earlier, last = passes[mesh.get_local_rank()]
    for each in [*earlier, last]:
        _backward(alone, each)
    for each in earlier:
        _backward(layers, each)
    with sums.overlap():
        _backward(layers, last)
    return Added(own=[p.grad for p in alone.parameters()], total=[p.grad for p in layers.parameters()])


def refusal_of_a_second_pass(mesh: DeviceMesh) -> str:
    layers = _layers(None)
    try:
        with GradientSums(layers, mesh, gradient_group(mesh.size()), bucket_bytes=1).overlap():
            _backward(layers, range(NUM_LAYERS))
            _backward(layers, range(NUM_LAYERS))
    except ValueError as error:
        return str(error)
    return "nothing"


def _loss_of_a_rank(mesh: DeviceMesh, case: Case) -> tuple[LanguageModel, Tensor]:
    model, widths = a_model(case), a_model(case)
    spread_experts(model, mesh)
    tokens, mask, noise = a_batch(case, widths, 0)
    rank = mesh.get_local_rank()
    own = slice(sum(case.rows[:rank]), sum(case.rows[: rank + 1]))
    nll, sums = loss_sums(model, tokens[own], mask[own], {n: draws[own] for n, draws in noise.items()})
    return model, nll / int(mask.sum()) + balance(sum_over_ranks(sums, mesh.get_group()))


def _layers(frozen: int | None) -> nn.ModuleList:
    torch.manual_seed(4)
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(NUM_LAYERS)])
    if frozen is not None:
        layers[frozen].requires_grad_(False)
    return layers


def _backward(layers: nn.ModuleList, order: Sequence[int]) -> None:
    x_TD = torch.ones(3, WIDTH, dtype=torch.float64)
    for place in order:
        x_TD = layers[place](x_TD).tanh()
    if x_TD.requires_grad:
        x_TD.square().sum().backward()
