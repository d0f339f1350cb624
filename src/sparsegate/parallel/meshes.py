"""How ranks are laid out: those that share the experts, copies of these, and nodes.

A mesh has the dimension "expert", over which the experts are spread, and may have "data" before it, with a
copy of them for each of its indices.
"""

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

EXPERT, DATA, NODE = "expert", "data", "node"


def in_copies(mesh: DeviceMesh, *, copies: int, timeout: timedelta | None = None) -> DeviceMesh:
    """The ranks of a mesh of "expert" alone as "data" x "expert"; called by all ranks together.

    copies: of the experts, each on consecutive ranks. timeout: of the collectives; None: torch's. ValueError:
    it does not divide the number of ranks.
    """
    if mesh.size() % copies:
        raise ValueError(f"copies of the experts ({copies}) must divide the number of ranks ({mesh.size()})")
    ranks = mesh.mesh.view(copies, -1)
    groups = [_group(ranks.T, timeout), _group(ranks, timeout)]
    return DeviceMesh.from_group(groups, mesh.device_type, mesh=ranks, mesh_dim_names=(DATA, EXPERT))


def in_nodes(mesh: DeviceMesh, *, ranks_per_node: int, timeout: timedelta | None = None) -> DeviceMesh:
    """The ranks that share the experts as nodes, and the ranks of each node; called by all ranks together.

    ranks_per_node: consecutive ranks of the dimension "expert", between which traffic is cheap. timeout: of
    the collectives; None: torch's. ValueError: it does not divide the number of these ranks.
    """
    place = dimensions(mesh).index(EXPERT)
    if mesh.size(place) % ranks_per_node:
        raise ValueError(
            f"ranks_per_node ({ranks_per_node}) must divide the number of ranks that share the experts "
            f"({mesh.size(place)}): start equally many on each node"
        )
    copies = mesh.mesh.movedim(place, -1).reshape(-1, mesh.size(place) // ranks_per_node, ranks_per_node)
    groups = [_group(copies.mT, timeout), _group(copies, timeout)]
    (own,) = [ranks for ranks in copies if mesh.get_rank() in ranks]
    return DeviceMesh.from_group(groups, mesh.device_type, mesh=own, mesh_dim_names=(NODE, EXPERT))


def in_one_row(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of a mesh in one dimension; called by all ranks together."""
    if mesh.ndim == 1:
        return mesh
    ranks = mesh.mesh.flatten()
    return DeviceMesh.from_group(_group(ranks, None), mesh.device_type, mesh_dim_names=(EXPERT,))


def dimensions(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of the mesh's dimensions. ValueError: it has others than it must."""
    names = mesh.mesh_dim_names or ()
    if EXPERT not in names or not set(names) <= {EXPERT, DATA}:
        raise ValueError(
            f"mesh (dimensions {', '.join(names) or 'without names'}) must have the dimension {EXPERT!r}, "
            f"and may have {DATA!r}: init_device_mesh(..., mesh_dim_names=({DATA!r}, {EXPERT!r}))"
        )
    return names


def _group(ranks: Tensor, timeout: timedelta | None) -> dist.ProcessGroup:
    """Of the row that has this rank. A mesh made by torch has no word for the timeout: half an hour."""
    rows = ranks.reshape(-1, ranks.shape[-1]).tolist()
    group, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    # NCCL connects at a group's first collective, which is not to be amid a backward pass.
    dist.barrier(group)
    return group
