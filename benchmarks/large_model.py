"""A model whose experts fill the memory takes training steps: its loss, its times, and its memory as planned.

    python -m benchmarks.large_model --data datasets/wiki
    python -m benchmarks.large_model --data datasets/wiki --model moe-4096-h --device cpu --batch-words 2048

The first is the paper's best model, 68.8 billion parameters, for a GPU of 139 GiB. Experts are kept in
bfloat16, rounded at random and updated in the backward pass by the factored optimizer; embedding and softmax
are updated by rows (docs/large_models.md). No checkpoint is written: it would be as large as the model.
Memory is beyond what the process, or the device, held before the model was made.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import RESULTS
from benchmarks.planned_memory import RESET, bytes_of
from sparsegate.benchmarking.measuring import circumstances, markdown, store
from sparsegate.models.memory import training_memory
from sparsegate.recipes.registry import recipe
from sparsegate.training.config import RunConfig
from sparsegate.training.log import read_log
from sparsegate.training.loop import Run, make_reporter
from sparsegate.training.memory import method_of, require_memory_for
from sparsegate.training.overrides import replace_by_path
from sparsegate.training.ranks import ALONE
from sparsegate.training.tasks import open_task

LARGE = {
    "model.expert_dtype": "bfloat16",
    "model.recompute": True,
    "optim.experts": "factored",
    "optim.in_backward": True,
    "optim.rounding": "stochastic",
    "optim.tables": "rows",
}


def main() -> int:
    args = _arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.large_model: no CUDA device here; --device cpu has smaller models", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = measure(config_of(args), Path(folder), args.device)
    except (OSError, ValueError) as error:
        print(f"benchmarks.large_model: {error}", file=sys.stderr)
        return 2
    path = args.out / f"large_model_{args.device}.json"
    store(path, {**circumstances(), **results})
    print(markdown([{key: value for key, value in results.items() if key != "losses"}]))
    print(json.dumps(results["losses"]))
    return 0


def config_of(args: argparse.Namespace) -> RunConfig:
    """The recipe with what large models need, and batches of so many words."""
    on_gpu = args.device == "cuda"
    changes = {
        **LARGE,
        "data": str(args.data),
        "seed": args.seed,
        "batches.batch_words": args.batch_words,
        "batches.max_length": 64,
        "optim.warmup_steps": args.steps // 2,
        "training.device": args.device,
        "training.kernels": "triton" if on_gpu else "auto",
        "training.precision": "bfloat16" if on_gpu else "float32",
        "training.steps": args.steps,
        "training.log_every": 1,
    }
    return replace_by_path(recipe(args.model), changes)


def measure(config: RunConfig, folder: Path, device: str) -> dict[str, Any]:
    """Make the model and train it."""
    task = open_task(config)
    require_memory_for(task.config)
    planned = training_memory(task.config.model, method_of(task.config))
    peak = memory_taken(device)
    started = time.monotonic()
    with make_reporter(task.config, folder, Console(stderr=True), ALONE) as reporter:
        run = Run(task, folder, reporter)
        made, ends = time.monotonic(), []
        while not run.finished:
            run.step()
            ends.append(time.monotonic())
    steps = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "step"]
    # The first ones compile, and allocate what is used again later.
    settled = ends[len(ends) // 2 :]
    return {
        "model": config.name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "parameters": sum(p.numel() for p in run.state.model.parameters()),
        "made (s)": made - started,
        "steps": len(steps),
        "words a step": steps[-1]["train/tokens"],
        "s a step": (settled[-1] - settled[0]) / max(1, len(settled) - 1),
        "planned (GiB)": planned.peak / 2**30,
        "peak (GiB)": peak() / 2**30,
        "losses": [line["train/loss"] for line in steps],
    }


def memory_taken(device: str) -> Callable[[], int]:
    """Begin to watch; what is returned tells the most that was held since then, beyond what was held now."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() - before
    resident = bytes_of("VmRSS")
    RESET.write_text("5")  # the peak begins anew
    return lambda: bytes_of("VmHWM") - resident


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of a dataset, of `sparsegate prepare`"
    )
    parser.add_argument("--model", default="news-moe-65536-h", help="of the recipes (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-words", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
