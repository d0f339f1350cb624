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

A mesh of the dimensions "data" and "expert" has several copies of the experts: one for each index of "data".
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..moe.experts.experts import Experts
from ..moe.layer import MoE
from .expert_parallel import ExpertParallel
from .gathered import Gathered
from .holding import HoldingOfRank
from .vocabulary import ShardedEmbedding, ShardedSoftmax

EXPERT, DATA, NODE = "expert", "data", "node"


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
    batch chooses among in training: the tokens of its rank, or those gathered from all ranks that share the
    experts.
    nodes: what `in_nodes` makes of the mesh, for tokens to cross once between nodes; None: straight to ranks.
    num_pieces: that a rank's tokens are cut into, so that one travels while another is computed.
    ValueError: no MoE in the model, fewer experts than ranks, or another mesh.
    """
    _dimensions(mesh)
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
    """Let gates that select over the batch choose, in training, among the tokens of all ranks of "expert"."""
    for moe in [module for module in model.modules() if isinstance(module, MoE)]:
        moe.gate = Gathered(moe.gate, mesh=mesh[EXPERT]).train(moe.training)


def in_nodes(mesh: DeviceMesh, *, ranks_per_node: int) -> DeviceMesh:
    """The ranks that share the experts as nodes, and the ranks of each node; called by all ranks together.

    ranks_per_node: consecutive ranks of the dimension "expert", between which traffic is cheap. ValueError:
    it does not divide the number of these ranks.
    """
    names = _dimensions(mesh)
    place = names.index(EXPERT)
    if mesh.size(place) % ranks_per_node:
        raise ValueError(
            f"ranks_per_node ({ranks_per_node}) must divide the number of ranks that share the experts "
            f"({mesh.size(place)}): start equally many on each node"
        )
    ranks = mesh.mesh.unflatten(place, (-1, ranks_per_node))
    by_node = DeviceMesh(
        mesh.device_type, ranks, mesh_dim_names=(*names[:place], NODE, EXPERT, *names[place + 1 :])
    )
    return by_node[NODE, EXPERT]


def shard_the_rest(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give all but the experts to FSDP2, which then adds up their gradients; `GradientSums` skips them.

    To have several groups of parameters, call `fully_shard` on parts of the model before, each with
    `ignored_params=set(expert_parameters(model))`.
    """
    fully_shard(model, mesh=mesh, ignored_params=set(spread_parameters(model)))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no division inside its collectives, and there is none to make.
            module.set_force_sum_reduction_for_comms(True)


def gradient_norm(model: nn.Module, mesh: DeviceMesh) -> Tensor:
    """The global norm of the gradients that `GradientSums` left, equal on all ranks."""
    shared_out = set(spread_parameters(model))
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    spread = _squared_norm([p.grad for p in with_gradient if p in shared_out], mesh)
    dist.all_reduce(spread, group=mesh.get_group(EXPERT))
    return (spread + _squared_norm([p.grad for p in with_gradient if p not in shared_out], mesh)).sqrt()


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


def _dimensions(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of the mesh's dimensions. ValueError: it has others than it must."""
    names = mesh.mesh_dim_names or ()
    if EXPERT not in names or not set(names) <= {EXPERT, DATA}:
        raise ValueError(
            f"mesh (dimensions {', '.join(names) or 'without names'}) must have the dimension {EXPERT!r}, "
            f"and may have {DATA!r}: init_device_mesh(..., mesh_dim_names=({DATA!r}, {EXPERT!r}))"
        )
    return names


def _squared_norm(gradients: list[Tensor | None], mesh: DeviceMesh) -> Tensor:
    """Of whole gradients, where each rank has a shard as well."""
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    norm = nn.utils.get_total_norm(values)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole.to(mesh.device_type).square()
