"""What `sparsegate plan --devices` says of traffic and memory beside what runs on so many ranks have.

    python -m benchmarks.planned_ranks

Processes with Gloo train a few steps. Bytes are counted at the collectives of a training step, without what a
rank sends to itself: to experts and back, and for words that are spread (all-to-all), and sums of gradients
(all-reduce; as a ring sends them). They are the mean of the ranks; the plan's are those of untrained gates,
which spread tokens evenly. The text's words are as frequent as the plan takes them to be.
Memory is the most that a rank holds beyond what it held before it made its model, the maximum over the ranks,
as in `benchmarks/planned_memory.py`.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import RESULTS
from benchmarks.planned_memory import RESET, bytes_of
from sparsegate.benchmarking.measuring import circumstances, markdown, store
from sparsegate.data import prepare
from sparsegate.models import MixtureLM
from sparsegate.models.softmax import draw_log_uniform
from sparsegate.recipes.cluster import Layout, Machine, lay_out
from sparsegate.recipes.registry import recipe
from sparsegate.training import loop
from sparsegate.training.config import RunConfig
from sparsegate.training.memory import batch_tokens, method_of
from sparsegate.training.overrides import replace_by_path
from sparsegate.training.ranks import Ranks

STEPS, WORDS = 4, 4000
CASES: dict[str, tuple[str, dict[str, object]]] = {
    # name: recipe, changes
    "32 experts": ("small-moe-32", {}),
    "256 experts, flat, factored": ("small-moe-256", {"optim.experts": "factored"}),
    "1,024 experts in 32 groups": ("small-moe-1024-h", {}),
    "1,024 experts in 32 groups, factored": ("small-moe-1024-h", {"optim.experts": "factored"}),
    "256 experts, flat, factored, two copies": (
        "small-moe-256",
        {"optim.experts": "factored", "training.expert_copies": 2},
    ),
    "no experts, words spread": ("small-lstm", {"training.vocabulary": "sharded"}),
    "no experts, words spread, 512 candidates": (
        "small-lstm",
        {"training.vocabulary": "sharded", "model.softmax_samples": 512},
    ),
}


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        text(Path(name))
        prepare(
            output=data,
            train=[Path(name, "text")],
            valid=[Path(name, "valid")],
            vocabulary="words",
            vocabulary_size=WORDS,
        )
        rows = [row for num_ranks in args.ranks for row in run_on_ranks(args.cases, num_ranks, data)]
    rows.sort(key=lambda row: args.cases.index(row["case"]))
    print(markdown(rows))
    if args.out:
        print(store(args.out, {**circumstances(), "rows": rows}))


def text(folder: Path) -> None:
    """Words as a sampled softmax draws them, in long lines, and each at least once."""
    torch.manual_seed(0)
    number_N = draw_log_uniform(300_000, WORDS - 2, device=torch.device("cpu"))
    words = [f"w{number}" for number in number_N[torch.randperm(len(number_N))].tolist()]
    words += [f"w{number}" for number in range(WORDS - 2)]
    lines = [" ".join(words[start : start + 400]) for start in range(0, len(words), 400)]
    Path(folder, "text").write_text("\n".join(lines))
    Path(folder, "valid").write_text("\n".join(lines[:3]))


def run_on_ranks(cases: list[str], num_ranks: int, data: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (num_ranks, cases, str(data), folder), nprocs=num_ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return [row(case, num_ranks, [rank[case] for rank in found]) for case in cases]


def row(case: str, num_ranks: int, found: list[dict[str, float]]) -> dict[str, Any]:
    """found: by rank."""
    layout = planned(case, num_ranks)
    to_send = layout.all_to_all_bytes + layout.word_bytes
    sent = sum(rank["all_to_all"] for rank in found) / num_ranks
    reduced = sum(rank["all_reduce"] for rank in found) / num_ranks
    to_reduce = layout.all_reduce_bytes + layout.copies_bytes
    memory = max(rank["memory"] for rank in found)
    return {
        "case": case,
        "ranks": num_ranks,
        "all-to-all, planned (MB)": to_send / 1e6,
        "measured (MB)": sent / 1e6,
        "measured / planned": sent / to_send if to_send else None,
        "all-reduce, planned (MB)": to_reduce / 1e6,
        " measured (MB)": reduced / 1e6,
        "memory, planned (MB)": layout.memory / 1e6,
        "  measured (MB)": memory / 1e6,
        " measured / planned": memory / layout.memory,
    }


def config_of(case: str) -> RunConfig:
    name, changes = CASES[case]
    config = recipe(name)
    changes = changes | {
        "batches.batch_size": 128,
        "training.steps": STEPS,
        "training.evaluate_every": STEPS,
        "training.checkpoint_every": STEPS,
    }
    return replace_by_path(replace(config, model=replace(config.model, vocab_size=WORDS)), changes)


def planned(case: str, num_ranks: int) -> Layout:
    config = config_of(case)
    return lay_out(
        config.model,
        Machine(devices=num_ranks),
        method_of(config),
        batch_tokens=batch_tokens(config),
        micro_batches=config.training.micro_batches,
        expert_copies=config.training.expert_copies,
    )


def _run_rank(rank: int, num_ranks: int, cases: list[str], data: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("expert",))
    gradient_group = dist.new_group()
    assert isinstance(gradient_group, dist.ProcessGroup)

    @contextmanager
    def these(*given: object, **options: object) -> Iterator[Ranks]:
        yield Ranks.of_mesh(mesh, gradient_group=gradient_group) if num_ranks > 1 else loop.ALONE

    with mock.patch.object(loop, "ranks_of_process", these):
        found = {
            case: _train(case, rank, num_ranks, data, Path(folder, str(number)))
            for number, case in enumerate(cases)
        }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _train(case: str, rank: int, num_ranks: int, data: str, folder: Path) -> dict[str, float]:
    """Bytes of this rank: sent in a step by each collective, and held at most."""
    config = replace(config_of(case), data=data)
    small: dict[str, object] = {"batches.batch_size": num_ranks}
    small |= {"model.num_experts": 8 * num_ranks} if isinstance(config.model, MixtureLM) else {}
    small |= {"model.gate.num_groups": num_ranks * 4} if config.name.endswith("-h") else {}
    sent: Counter[str] = Counter()
    loop.train(replace_by_path(config, small), folder=folder / "first")  # loads what is loaded once
    dist.barrier()
    before = bytes_of("VmRSS")
    RESET.write_text("5")  # the peak begins anew
    with counted_in_steps(sent):
        loop.train(config, folder=folder / "run")
    memory = bytes_of("VmHWM") - before
    return {**{name: sent[name] / STEPS for name in ("all_to_all", "all_reduce")}, "memory": memory}


@contextmanager
def counted_in_steps(sent: Counter[str]) -> Iterator[None]:
    """Add up what this rank sends to others in the steps of training, by collective."""
    step, all_to_all, all_reduce = loop.Run.step, dist.all_to_all_single, dist.all_reduce

    def count_all_to_all(into: Tensor, tensor: Tensor, received=None, given=None, **options):
        group = options.get("group")
        own, members = dist.get_rank(group), dist.get_world_size(group)
        rows = len(tensor) // members if given is None else given[own]
        sent["all_to_all"] += tensor.nbytes - tensor[:rows].nbytes
        return all_to_all(into, tensor, received, given, **options)

    def count_all_reduce(tensor: Tensor, *given, **options):
        members = dist.get_world_size(options.get("group"))
        sent["all_reduce"] += 2 * (members - 1) * tensor.nbytes // members
        return all_reduce(tensor, *given, **options)

    def counted(run: loop.Run) -> None:
        with (
            mock.patch.object(dist, "all_to_all_single", count_all_to_all),
            mock.patch.object(dist, "all_reduce", count_all_reduce),
        ):
            step(run)

    with mock.patch.object(loop.Run, "step", counted):
        yield


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path, help=f"for example {RESULTS.name}/planned_ranks.json")
    return parser.parse_args()


if __name__ == "__main__":
    # What is freed goes back to the system at once: the allocator's waste is not predicted.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    main()
