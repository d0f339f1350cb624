"""What it costs to spread experts over ranks: weak scaling of the layer, bytes, and communication's share.

    python -m benchmarks.parallel

Processes with Gloo, one thread each, as many tokens and experts on every rank whatever their number. A step
is a forward and a backward pass with the exchange; "alone" is the layer of one process without it. Before
anything is timed, the spread layer's output must be that of the whole layer. bytes sent: by a rank in a step,
to other ranks and to itself, counted at the collectives. waiting: the share of a step that is spent in them,
copies and the wait for the slowest rank included.
"""

import argparse
import os
import statistics
import tempfile
import time
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

NAMES = ("alone", "spread", "waiting", "bytes")


class Counted:
    """The all-to-all collectives of torch, with what goes through them."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        self._collective = dist.all_to_all_single

    def all_to_all_single(self, into: Tensor, tensor: Tensor, *given, **options):
        begin = time.perf_counter()
        work = self._collective(into, tensor, *given, **options)
        if work is not None:
            work.wait()
        self.seconds += time.perf_counter() - begin
        self.bytes += tensor.nbytes
        return work


def main() -> None:
    args = _arguments()
    rows = []
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_run_rank, (num_ranks, args, folder), nprocs=num_ranks)
            found = [load_file(Path(folder, f"{rank}.safetensors")) for rank in range(num_ranks)]
        seconds = {name: max(float(rank[name]) for rank in found) for name in NAMES}
        rows.append(
            {
                "ranks": num_ranks,
                "experts": num_ranks * args.experts,
                "tokens/s": num_ranks * args.tokens / seconds["spread"],
                "ms per step": 1e3 * seconds["spread"],
                "alone, ms": 1e3 * seconds["alone"],
                "MB sent by a rank": seconds["bytes"] / 1e6,
                "waiting": seconds["waiting"] / seconds["spread"],
            }
        )
    print(markdown(rows))
    print(store(RESULTS / "parallel.json", {**circumstances(), "rows": rows}))


def _run_rank(rank: int, num_ranks: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    if num_ranks <= (os.cpu_count() or 1):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("expert",))
    save_file(_measure(mesh, args), Path(folder, f"{rank}.safetensors"))
    dist.destroy_process_group()


def _measure(mesh: DeviceMesh, args: argparse.Namespace) -> dict[str, Tensor]:
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
    spread_experts(layer, mesh)
    with torch.no_grad():
        torch.testing.assert_close(layer(x_TD)[0], whole_TD, rtol=1e-4, atol=1e-4)
    del whole_TD
    layer.train()
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for repeat in range(args.repeats + 2):
        counted = Counted()
        for name, moe in (("alone", alone), ("spread", layer)):
            dist.barrier()
            begin = time.perf_counter()
            with mock.patch.object(dist, "all_to_all_single", counted.all_to_all_single):
                moe(x_TD)[0].square().mean().backward()
            times[name] += [time.perf_counter() - begin] if repeat >= 2 else []
        times["waiting"] += [counted.seconds] if repeat >= 2 else []
        times["bytes"] += [counted.bytes] if repeat >= 2 else []
    return {name: torch.tensor(statistics.median(own), dtype=torch.float64) for name, own in times.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=4096, help="on each rank")
    parser.add_argument("--experts", type=int, default=16, help="on each rank")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=11)
    return parser.parse_args()


if __name__ == "__main__":
    main()
