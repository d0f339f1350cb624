"""What it saves to add up the ranks' gradients in the backward pass, and not after it.

    python -m benchmarks.gradient_sums

Processes with Gloo, one thread each, take whole steps of a language model without its update, in turn with
sums that begin in the backward pass and with sums that begin when it has ended. Both must leave the same
gradients, bit for bit. A rank's step counts as long as the slowest rank's. Where ranks have no cores to
spare, sums take from the backward pass what they save after it.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import RESULTS
from benchmarks.training_speed import random_text
from sparsegate.benchmarking.measuring import circumstances, markdown, store
from sparsegate.recipes.registry import recipe
from sparsegate.training.making import make_state
from sparsegate.training.ranks import Ranks
from sparsegate.training.step import compute_gradient
from sparsegate.training.tasks.language import language_parts

WHEN = ("after", "in backward")


def main() -> None:
    args = _arguments()
    rows = []
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_run_rank, (num_ranks, args, folder), nprocs=num_ranks)
            found = [load_file(Path(folder, f"{rank}.safetensors")) for rank in range(num_ranks)]
        slowest = {when: torch.stack([rank[when] for rank in found]).amax(dim=0).tolist() for when in WHEN}
        median = {when: statistics.median(times) for when, times in slowest.items()}
        rows.append(
            {
                "model": args.model,
                "ranks": num_ranks,
                **{f"sums {when} (ms)": 1e3 * median[when] for when in WHEN},
                "rate": median["after"] / median["in backward"],
            }
        )
    print(markdown(rows))
    print(store(RESULTS / "gradient_sums.json", {**circumstances(), "rows": rows}))


def _run_rank(rank: int, num_ranks: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("expert",))
    gradient_group = dist.new_group()
    assert isinstance(gradient_group, dist.ProcessGroup)
    times = _measure(Ranks.of_mesh(mesh, gradient_group=gradient_group), args)
    save_file(times, Path(folder, f"{rank}.safetensors"))
    dist.destroy_process_group()


def _measure(ranks: Ranks, args: argparse.Namespace) -> dict[str, Tensor]:
    """Seconds of each step, by when sums begin."""
    config = recipe(args.model)
    config = replace(config, model=replace(config.model, vocab_size=args.vocabulary))
    model = make_state(config, ranks).model
    torch.manual_seed(1 + ranks.rank)
    batch = random_text(args)

    def step(when: str) -> None:
        parts = list(language_parts(model, batch, {}, config))
        if when == "in backward":
            compute_gradient(model, parts, config, ranks)
            return
        with mock.patch.object(Ranks, "adding_up_gradients", return_value=nullcontext()):
            compute_gradient(model, parts, config, ranks)
        with ranks.adding_up_gradients(model):
            pass

    times: dict[str, list[float]] = {when: [] for when in WHEN}
    for repeat in range(args.repeats + 1):
        left = []
        for when in WHEN:
            dist.barrier()
            begin = time.perf_counter()
            step(when)
            times[when] += [time.perf_counter() - begin] if repeat else []
            left.append([parameter.grad for parameter in model.parameters()])
        if not repeat:
            assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))
    return {when: torch.tensor(own, dtype=torch.float64) for when, own in times.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--model", default="small-moe-32")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=32, help="rows on each rank")
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
