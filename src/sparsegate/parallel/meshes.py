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
    return _mesh(mesh, mesh.mesh.view(copies, -1), (DATA, EXPERT), timeout)


def in_nodes(mesh: DeviceMesh, *, ranks_per_node: int, timeout: timedelta | None = None) -> DeviceMesh:
    """The ranks that share the experts as nodes, and the ranks of each node; called by all ranks together.

    ranks_per_node: consecutive ranks of the dimension "expert", between which traffic is cheap. timeout: of
    the collectives; None: torch's. ValueError: it does not divide the number of these ranks.
    """
    names = dimensions(mesh)
    place = names.index(EXPERT)
    if mesh.size(place) % ranks_per_node:
        raise ValueError(
            f"ranks_per_node ({ranks_per_node}) must divide the number of ranks that share the experts "
            f"({mesh.size(place)}): start equally many on each node"
        )
    ranks = mesh.mesh.unflatten(place, (-1, ranks_per_node))
    names = (*names[:place], NODE, EXPERT, *names[place + 1 :])
    return _mesh(mesh, ranks, names, timeout)[NODE, EXPERT]


def dimensions(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of the mesh's dimensions. ValueError: it has others than it must."""
    names = mesh.mesh_dim_names or ()
    if EXPERT not in names or not set(names) <= {EXPERT, DATA}:
        raise ValueError(
            f"mesh (dimensions {', '.join(names) or 'without names'}) must have the dimension {EXPERT!r}, "
            f"and may have {DATA!r}: init_device_mesh(..., mesh_dim_names=({DATA!r}, {EXPERT!r}))"
        )
    return names


def _mesh(like: DeviceMesh, ranks: Tensor, names: tuple[str, ...], timeout: timedelta | None) -> DeviceMesh:
    """Torch's own way to make one has no word for the timeout, and takes half an hour."""
    groups = []
    for place in range(ranks.dim()):
        rows = ranks.movedim(place, -1).reshape(-1, ranks.size(place)).tolist()
        group, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        # NCCL connects at a group's first collective, which is not to be amid a backward pass.
        dist.barrier(group)
        groups.append(group)
    return DeviceMesh.from_group(groups, like.device_type, mesh=ranks, mesh_dim_names=names)
