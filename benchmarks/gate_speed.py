"""Tokens per second of training with each gate, at equal multiply-adds, beside noisy top-k gating.

    python -m benchmarks.gate_speed

Whole steps of the variants of `benchmarks.mixtures gates` on the same random text, in turn in one process.
Before anything is timed, the loss must be the one of an untrained model. rate: the time per step of noisy
top-4 over that of the variant.
"""

import argparse
import statistics

import torch

from benchmarks import RESULTS
from benchmarks.mixtures import GATES
from benchmarks.training_speed import stepper
from sparsegate.benchmarking.measuring import circumstances, markdown, median_ratio, seconds, store
from sparsegate.recipes.registry import recipe

BASELINE = "noisy top-4"


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    steps = {name: stepper(vary(recipe(args.recipe)), args) for name, vary in GATES.items()}
    times = seconds(steps, repeats=args.repeats)
    tokens = args.batch_size * args.num_steps
    rows = [
        {
            "gate": name,
            "tokens/s": tokens / statistics.median(own),
            "rate": median_ratio(times[BASELINE], own),
        }
        for name, own in times.items()
    ]
    print(markdown(rows))
    print(store(RESULTS / "gate_speed.json", {**circumstances(), "rows": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="small-moe-32")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
