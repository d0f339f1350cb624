"""Ranks that wait for one that does not come."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sparsegate.parallel.exchange import Rows, exchange
from sparsegate.parallel.meshes import EXPERT, in_copies, in_nodes
from sparsegate.training.missing import GRACE_S, RankMissing, naming_the_missing
from sparsegate.training.ranks import Ranks

TIMEOUT_S = 0.5
LATEST_S = TIMEOUT_S + 2 * GRACE_S


def wait_on_rank(
    mesh: DeviceMesh, late: int, where: str, near: tuple[int, ...] | None = None
) -> tuple[str, float]:
    """What a rank says, and after how many seconds, when rank `late` comes LATEST_S after the others.

    mesh: of all ranks. where: "sum", "backward" or "gradients". near: those that it shares the experts with;
    None: all.
    """
    # Its connections break: a group that no other law uses.
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    ranks = Ranks.of_mesh(
        DeviceMesh.from_group(group, "cpu", mesh_dim_names=("expert",)), gradient_group=group
    )
    rows = Rows(sent_W=(1,) * mesh.size(), received_W=(1,) * mesh.size())
    x_TD, layer = torch.ones(mesh.size(), 2, requires_grad=True), nn.Linear(2, 2)
    (y_TD,) = exchange([x_TD], [rows], group)
    dist.barrier(group)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), group)  # long enough for no start
    begin = time.monotonic()
    time.sleep(LATEST_S if ranks.rank == late else 0)
    try:
        with naming_the_missing(group, lambda: 7, near=None if near is None else lambda: near):
            if where == "sum":
                ranks.sum(1.0)
            elif where == "backward":
                y_TD.sum().backward()
            else:
                with ranks.adding_up_gradients(layer):
                    layer(x_TD).sum().backward()
    except RankMissing as error:
        return str(error), time.monotonic() - begin
    return "nothing", time.monotonic() - begin


def wait_in_layouts_on_rank(mesh: DeviceMesh) -> list[float]:
    """How many seconds a rank waits for another among those of its copy, and of its node.

    mesh: of all four. The first rank of each does not come.
    """
    timeout = timedelta(seconds=TIMEOUT_S)
    layouts = [in_copies(mesh, copies=2, timeout=timeout), in_nodes(mesh, ranks_per_node=2, timeout=timeout)]
    waited = []
    for layout in layouts:
        begin = time.monotonic()
        try:
            if layout.get_local_rank(EXPERT):
                dist.barrier(layout.get_group(EXPERT))
        except RuntimeError:
            waited.append(time.monotonic() - begin)
    dist.barrier(mesh.get_group())
    return waited
