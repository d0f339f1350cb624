"""Laying ranks over a finished model: one copy of each expert, everything else on every rank.

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("expert",))
    spread_experts(model, mesh)
    sums = GradientSums(model, mesh, group)  # see `gradients.py`
    ...
    with sums.overlap():
        loss.backward()  # a sum over this rank's tokens, divided by the number of all ranks' tokens

One rule of scale: a rank's loss is a sum over its own tokens, divided by the count of the global batch, plus
the balance losses of the sums that `sum_over_ranks` gives; gradients are added up over the ranks, never
averaged. Those of the experts then need no factor: the tokens of all ranks came to them. They are the
gradients of one process on the joined batch.

A mesh of the dimensions "data" and "expert" has several copies of the experts, one for each index of "data".
`shard_experts` makes one of these copies, cut over the ranks that would have one each.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..moe.experts.experts import Experts
from ..moe.layer import MoE
from .expert_parallel import ExpertParallel
from .gathered import Gathered
from .holding import HoldingOfRank
from .meshes import DATA, EXPERT, dimensions, in_one_row
from .vocabulary import ShardedEmbedding, ShardedSoftmax


def spread_experts(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    selection: Literal["rank", "gathered"] = "rank",
    nodes: DeviceMesh | None = None,
    num_pieces: int = 1,
) -> None:
    """Leave each rank its share of the experts of every `MoE` in a model, in place.

    model: the same on all ranks, or on the meta device. Optimizers are made afterwards. mesh: has a dimension
    "expert", and "data" where the experts have several copies. selection: what a gate that selects over the
    batch chooses among in training: the tokens of its rank, or those gathered from all ranks.
    nodes: what `in_nodes` makes of the mesh, for tokens to cross once between nodes; None: straight to ranks.
    num_pieces: that a rank's tokens are cut into, so that one travels while another is computed.
    ValueError: no MoE in the model, fewer experts than ranks, or another mesh.
    """
    dimensions(mesh)
    holding = HoldingOfRank(mesh[EXPERT], nodes=nodes, num_pieces=num_pieces)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no MoE layer whose experts could be spread")
    spread: dict[Experts, Experts] = {}
    for moe in layers:
        if moe.experts not in spread:  # layers may share theirs
            spread[moe.experts] = holding.experts(_parts_of(moe.experts), moe.experts.num_experts)
        moe.experts = spread[moe.experts]
    if selection == "gathered":
        gather_selection(model, mesh)


def gather_selection(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let gates that select over the batch choose, in training, among the tokens of all ranks of a mesh."""
    mesh = in_one_row(mesh)
    for moe in [module for module in model.modules() if isinstance(module, MoE)]:
        moe.gate = Gathered(moe.gate, mesh=mesh).train(moe.training)


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give the experts to FSDP2, for those that outgrow a rank: one copy of them, cut over "data".

    After `spread_experts`, before optimizers are made. The ranks of a column of the mesh, which would have a
    copy each of the same experts, have equal parts of their weights, gradients and optimizer state instead. A
    layer's weights are whole on a rank while it computes, forward and backward. FSDP2 adds up their gradients
    over "data"; `GradientSums` skips them. ValueError: the mesh has no dimension "data".
    """
    if DATA not in dimensions(mesh):
        raise ValueError(
            f"mesh (dimension {EXPERT!r} alone) must have the dimension {DATA!r}, over which experts are cut"
        )
    copies = mesh[DATA].size()
    for experts in _spread(model):
        fully_shard(
            experts.experts,
            mesh=mesh[DATA],
            reshard_after_forward=True,
            shard_placement_fn=lambda parameter: Shard(_axis_to_cut(parameter, copies)),
        )
    _add_up_gradients(model)


def _axis_to_cut(parameter: nn.Parameter, num_parts: int) -> int:
    """The first that is cut evenly; experts where none is, which FSDP2 alone takes apart unevenly."""
    return next((axis for axis, size in enumerate(parameter.shape) if size % num_parts == 0), 0)


def shard_the_rest(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give all but the experts to FSDP2, which then adds up their gradients; `GradientSums` skips them.

    To have several groups of parameters, call `fully_shard` on parts of the model before, each with
    `ignored_params=set(expert_parameters(model))`.
    """
    fully_shard(model, mesh=mesh, ignored_params=set(spread_parameters(model)))
    _add_up_gradients(model)


def _add_up_gradients(model: nn.Module) -> None:
    """FSDP2 would take their mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no division inside its collectives, and there is none to make.
            module.set_force_sum_reduction_for_comms(True)


def gradient_norm(model: nn.Module, mesh: DeviceMesh) -> Tensor:
    """The global norm of the gradients that `GradientSums` left, bit for bit equal on all ranks."""
    shared_out = set(spread_parameters(model))
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    spread = _squared_norm([p.grad for p in with_gradient if p in shared_out], mesh)
    dist.all_reduce(spread, group=mesh.get_group(EXPERT))
    norm = (spread + _squared_norm([p.grad for p in with_gradient if p not in shared_out], mesh)).sqrt()
    if DATA in dimensions(mesh):
        # Each copy has added up its squares in an order of its own: what is clipped would drift apart.
        dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=mesh.get_group(DATA))
    return norm


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of this rank's experts."""
    return [parameter for experts in _spread(model) for parameter in experts.parameters()]


def word_parameters(model: nn.Module) -> list[nn.Parameter]:
    """This rank's rows of the vocabulary, where these are spread."""
    tables = (m for m in model.modules() if isinstance(m, ShardedEmbedding | ShardedSoftmax))
    return [parameter for table in tables for parameter in table.parameters()]


def spread_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that stands on one rank alone."""
    return expert_parameters(model) + word_parameters(model)


def names_in_one_process(model: nn.Module) -> dict[str, str]:
    """Each parameter's and buffer's name in this model, and its name in the model of one process."""
    wrapped = {
        f"{path}.{inner}.": f"{path}." for path, module in model.named_modules() for inner in _inner(module)
    }

    def in_one_process(name: str) -> str:
        for ours, theirs in wrapped.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    return {name: in_one_process(name) for name in model.state_dict()}


def _parts_of(experts: Experts) -> Callable[[range], Experts]:
    return lambda own: experts.part(own.start, own.stop)


def _inner(module: nn.Module) -> tuple[str, ...]:
    """The name below which a wrapper of ours holds what it wraps."""
    if isinstance(module, ExpertParallel):
        return ("experts",)
    return ("gate",) if isinstance(module, Gathered) else ()


def _spread(model: nn.Module) -> Iterator[ExpertParallel]:
    return (module for module in model.modules() if isinstance(module, ExpertParallel))


def _squared_norm(gradients: list[Tensor | None], mesh: DeviceMesh) -> Tensor:
    """Of whole gradients, where each rank has a shard as well."""
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    norm = nn.utils.get_total_norm(values)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole.to(mesh.device_type).square()
