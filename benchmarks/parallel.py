"""What it costs to spread experts over ranks: weak scaling of the layer, bytes, and communication's share.

    python -m benchmarks.parallel

Processes with Gloo, one thread each, as many tokens and experts on every rank whatever their number. A step
is a forward and a backward pass with the exchange; "alone" is the layer of one process without it. Before
anything is timed, the spread layer's output must be that of the whole layer. bytes sent: by a rank in a step,
to other ranks and to itself, counted at the collectives. waiting: the share of a step that is spent in them,
copies and the wait for the slowest rank included. pieces: that a rank's tokens travel in. by node: ranks of a
node, where tokens cross once between nodes; bytes between nodes are of all ranks, for nodes of
`--ranks-per-node`.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks import RESULTS
from sparsegate import MoE
from sparsegate.benchmarking.measuring import circumstances, markdown, store
from sparsegate.parallel.distribute import spread_experts
from sparsegate.parallel.meshes import in_nodes

NAMES = ("alone", "spread", "waiting", "bytes", "between")


class Counted:
    """The all-to-all collectives of torch, with what goes through them. per_node: ranks of each node."""

    def __init__(self, per_node: int) -> None:
        self.bytes, self.bytes_between, self.seconds = 0, 0, 0.0
        self._collective, self._per_node = dist.all_to_all_single, per_node

    def all_to_all_single(self, into: Tensor, tensor: Tensor, received=None, sent=None, *, group, **options):
        begin = time.perf_counter()
        work = self._collective(into, tensor, received, sent, group=group, **options)
        self.seconds += time.perf_counter() - begin
        self.bytes += tensor.nbytes
        members = dist.get_process_group_ranks(group)
        for part, member in zip(
            tensor.split(sent) if sent else tensor.chunk(len(members)), members, strict=True
        ):
            is_near = member // self._per_node == dist.get_rank() // self._per_node
            self.bytes_between += 0 if is_near else part.nbytes
        return None if work is None else Waited(work, self)


class Waited:
    """A collective that tells how long it was waited for."""

    def __init__(self, work: dist.Work, counted: Counted) -> None:
        self.work, self.counted = work, counted

    def wait(self) -> None:
        begin = time.perf_counter()
        self.work.wait()
        self.counted.seconds += time.perf_counter() - begin


def main() -> None:
    args = _arguments()
    rows = []
    for num_ranks, pieces, by_node in product(args.ranks, args.pieces, args.by_node):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_run_rank, (num_ranks, pieces, by_node, args, folder), nprocs=num_ranks)
            found = [load_file(Path(folder, f"{rank}.safetensors")) for rank in range(num_ranks)]
        seconds = {name: max(float(rank[name]) for rank in found) for name in NAMES}
        rows.append(
            {
                "ranks": num_ranks,
                "pieces": pieces,
                "by node": "yes" if by_node else "no",
                "experts": num_ranks * args.experts,
                "tokens/s": num_ranks * args.tokens / seconds["spread"],
                "ms per step": 1e3 * seconds["spread"],
                "alone, ms": 1e3 * seconds["alone"],
                "MB sent by a rank": seconds["bytes"] / 1e6,
                "MB between nodes": sum(float(rank["between"]) for rank in found) / 1e6,
                "waiting": seconds["waiting"] / seconds["spread"],
            }
        )
    print(markdown(rows))
    print(store(RESULTS / "parallel.json", {**circumstances(), "rows": rows}))


def _run_rank(
    rank: int, num_ranks: int, pieces: int, by_node: bool, args: argparse.Namespace, folder: str
) -> None:
    torch.set_num_threads(1)
    if num_ranks <= (os.cpu_count() or 1):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("expert",))
    nodes = in_nodes(mesh, ranks_per_node=args.ranks_per_node) if by_node else None
    save_file(_measure(mesh, nodes, pieces, args), Path(folder, f"{rank}.safetensors"))
    dist.destroy_process_group()


def _measure(
    mesh: DeviceMesh, nodes: DeviceMesh | None, pieces: int, args: argparse.Namespace
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer = MoE.noisy_topk(
        width=args.width, hidden=args.hidden, num_experts=mesh.size() * args.experts, k=args.k
    )
    torch.nn.init.normal_(layer.gate.w_gate, std=0.1)
    alone = MoE.noisy_topk(width=args.width, hidden=args.hidden, num_experts=args.experts, k=args.k)
    torch.manual_seed(1 + mesh.get_local_rank())
    x_TD = torch.randn(args.tokens, args.width, requires_grad=True)
    with torch.no_grad():
        whole_TD, _ = layer.eval()(x_TD)
    spread_experts(layer, mesh, nodes=nodes, num_pieces=pieces)
    with torch.no_grad():
        torch.testing.assert_close(layer(x_TD)[0], whole_TD, rtol=1e-4, atol=1e-4)
    del whole_TD
    layer.train()
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for repeat in range(args.repeats + 2):
        counted = Counted(args.ranks_per_node)
        for name, moe in (("alone", alone), ("spread", layer)):
            dist.barrier()
            begin = time.perf_counter()
            with mock.patch.object(dist, "all_to_all_single", counted.all_to_all_single):
                moe(x_TD)[0].square().mean().backward()
            times[name] += [time.perf_counter() - begin] if repeat >= 2 else []
        times["waiting"] += [counted.seconds] if repeat >= 2 else []
        times["between"] += [counted.bytes_between] if repeat >= 2 else []
        times["bytes"] += [counted.bytes] if repeat >= 2 else []
    return {name: torch.tensor(statistics.median(own), dtype=torch.float64) for name, own in times.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pieces", type=int, nargs="+", default=[1])
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--by-node", type=int, nargs="+", choices=[0, 1], default=[0], help="1: cross once")
    parser.add_argument("--tokens", type=int, default=4096, help="on each rank")
    parser.add_argument("--experts", type=int, default=16, help="on each rank")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=11)
    return parser.parse_args()


if __name__ == "__main__":
    main()
