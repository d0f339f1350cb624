"""One mixture of experts, varied in one thing: table 6 of the paper (loss weights), and the same for others.

    python -m benchmarks.mixtures losses --data DIR --out RUNS --steps 2000
    python -m benchmarks.mixtures gates --data DIR --out RUNS --steps 2000
    python -m benchmarks.mixtures optimizers --data DIR --out RUNS --steps 2000
    python -m benchmarks.mixtures softmax --data DIR --out RUNS --steps 2000

All variants see the same batches and have the recipe's multiply-adds per token. A learning rate is chosen for
each, and one for its experts, on the validation split after `--search-steps`; loss weights share them. Then
one run for each seed, reported on the test split, beside the first row's with the same seeds: the ratio of
perplexities, with Student's 95% interval over the seeds. The balance is a mean over the logged training
batches of the last quarter of the steps, as in the paper. Everything is a run folder and is resumed when the
command is given again.

What changes the time of a step is timed first, on random text, in turn with the first row in one process; a
row "in equal time" makes as many steps as that leaves it.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.equal_computation import final_run, shortened
from benchmarks.training_speed import stepper
from sparsegate.benchmarking.measuring import circumstances, median_ratio, seconds
from sparsegate.data import Dataset
from sparsegate.inspection.balance import BALANCE_METRICS
from sparsegate.models.gates import (
    BalancedGate,
    ExpertChoiceGate,
    HierarchicalGate,
    SigmoidTopKGate,
    SoftmaxGate,
    SoftmaxTopKGate,
)
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import recipe
from sparsegate.recipes.search import Trial, search
from sparsegate.recipes.study.intervals import over_seeds
from sparsegate.training.config import ContinuousConfig, LossConfig, RunConfig
from sparsegate.training.log import read_log
from sparsegate.training.storage import read_json, write_json_atomically

Vary = Callable[[RunConfig], RunConfig]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    base = replace(recipe(args.recipe), data=str(args.data), seed=0)
    base = replace(base, model=replace(base.model, dropout=0.0))
    variants = TABLES[args.table]
    shared = best_trial(base, args, args.recipe) if args.table == "losses" else None
    speeds = steps_per_step(variants, base, args) if args.table in ("optimizers", "softmax") else {}
    rows: list[dict[str, Any]] = []
    for name in args.only or variants:
        config = variants[name](base)
        best = shared or best_trial(config, args, name.removesuffix(IN_EQUAL_TIME))
        rates = {"learning_rate": best.learning_rate, "expert_rate": best.expert_rate}
        config = replace(config, optim=replace(config.optim, **rates))
        costs = plan(config.model)
        steps = round(args.steps * speeds[name]) if name.endswith(IN_EQUAL_TIME) else args.steps
        rows.append(
            {
                "name": name,
                "ops_per_timestep": costs.ops_per_timestep,
                "parameters_without_embedding_and_softmax": costs.parameters_without_embedding_and_softmax,
                **rates,
                "steps": steps,
                "steps_per_step_of_first": speeds.get(name),
                "runs": runs(config, args, name, steps),
            }
        )
        rows[-1]["against_first"] = against(rows[-1]["runs"], rows[0]["runs"])
        write_json_atomically(
            args.out / f"{args.table}.json", {**circumstances(), "steps": args.steps, "rows": rows}
        )
        print(table(rows), flush=True)


def steps_per_step(
    variants: Mapping[str, Vary], base: RunConfig, args: argparse.Namespace
) -> dict[str, float]:
    """How many steps each variant makes while the first one makes one; measured once for a folder."""
    kept = args.out / f"{args.table}_speeds.json"
    if kept.exists():
        return {name: float(speed) for name, speed in read_json(kept).items()}
    assert isinstance(base.batches, ContinuousConfig)
    sizes = argparse.Namespace(
        vocabulary=Dataset.open(args.data).vocabulary.size,
        batch_size=base.batches.batch_size,
        num_steps=base.batches.num_steps,
    )
    first, *_ = variants
    steps = {name: stepper(vary(base), sizes) for name, vary in variants.items()}
    times = seconds(steps, repeats=args.timed_steps)
    speeds = {name: median_ratio(times[first], times[name]) for name in variants}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json_atomically(kept, speeds)
    return speeds


def against(runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, float]:
    """Perplexity over that of the first row's run of the same seed: geometric mean, and its interval."""
    by_seed = {run["seed"]: run["test_perplexity"] for run in first}
    logs = [math.log(run["test_perplexity"] / by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if len(logs) < 2:
        return {"ratio": math.exp(sum(logs))}
    interval = over_seeds(logs)
    return {
        name: math.exp(getattr(interval, at))
        for name, at in [("ratio", "mean"), ("low", "low"), ("high", "high")]
    }


def best_trial(config: RunConfig, args: argparse.Namespace, name: str) -> Trial:
    """The rates of lowest validation perplexity after the search steps."""
    trials = search(
        shortened(config, args.search_steps),
        folder=args.out / name / "search",
        learning_rates=args.learning_rates,
        expert_rates=args.expert_rates or [config.optim.expert_rate],
        dropouts=[0.0],
        console=None,
        on_trial=lambda trial: print(name, trial, flush=True),
    )
    return trials[0]


def runs(config: RunConfig, args: argparse.Namespace, name: str, steps: int) -> list[dict[str, Any]]:
    """The results of each seed's run."""
    config = shortened(config, steps)
    results = []
    for seed in args.seeds:
        folder = args.out / name / f"seed-{seed}"
        result = final_run(replace(config, seed=seed), folder=folder)
        results.append({**result, "training": training_balance(folder / "log.jsonl", after=steps * 3 // 4)})
    return results


def training_balance(log: Path, *, after: int) -> dict[str, float]:
    """Balance of the mixture layer, a mean over the logged batches after a step."""
    lines = [line for line in read_log(log) if line["kind"] == "step" and line["step"] > after]
    return {metric: _mean(line[f"moe/{metric}"] for line in lines) for metric in BALANCE_METRICS}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows so far, in Markdown: means over the seeds, perplexity of each."""
    lines = [
        [
            "",
            "learning rate",
            "of experts",
            "test perplexity by seed",
            "against the first",
            *BALANCE_METRICS,
            "words seen (M)",
            "hours a run",
        ]
    ]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        perplexities = ", ".join(f"{run['test_perplexity']:.2f}" for run in row["runs"])
        balance = [
            f"{_mean(run['training'][metric] for run in row['runs']):.2f}" for metric in BALANCE_METRICS
        ]
        words = f"{_mean(run['words'] for run in row['runs']) / 1e6:.2f}"
        hours = f"{_mean(run['hours'] for run in row['runs']):.2f}"
        beside = " to ".join(
            f"{row['against_first'][at]:.3f}" for at in ("low", "high") if at in row["against_first"]
        )
        beside = f"{row['against_first']['ratio']:.3f}" + f" ({beside})" * bool(beside)
        rates = [f"{row[rate]:g}" for rate in ("learning_rate", "expert_rate")]
        lines.append([row["name"], *rates, perplexities, beside, *balance, words, hours])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _losses(importance: float, load: float) -> Vary:
    return lambda config: replace(config, losses=LossConfig(importance=importance, load=load))


def _losses_of(**weights: float) -> LossConfig:
    return replace(LossConfig(importance=0.0, load=0.0), **weights)


# The six rows of table 6: weights of the importance and the load loss.
LOSSES: Mapping[str, Vary] = {
    f"importance {importance:g}, load {load:g}": _losses(importance, load)
    for importance, load in [(0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1), (0.01, 0.01), (1.0, 1.0)]
}


def _gate(losses: LossConfig, **model: Any) -> Vary:
    return lambda config: replace(config, losses=losses, model=replace(config.model, **model))


# Losses are those that were proposed with the gate; experts have the hidden width that gives equal cost.
_CV, _SWITCH, _NONE = LossConfig(), _losses_of(switch=0.01), _losses_of()
_IMPORTANCE = _losses_of(importance=0.1)
GATES: Mapping[str, Vary] = {
    "noisy top-4": _gate(_CV),
    "noisy top-4, SwiGLU experts": _gate(_CV, experts="swiglu", hidden=171),
    "noisy top-4, capacity 1.25": _gate(_CV, capacity=1.25),
    "hierarchical noisy, 2 of 8 groups, 2 of 4 experts": _gate(_CV, gate=HierarchicalGate(num_groups=8)),
    "strictly balanced": _gate(_IMPORTANCE, gate=BalancedGate()),
    "strictly balanced, hierarchical": _gate(
        _IMPORTANCE, gate=HierarchicalGate(num_groups=8, primary="balanced", secondary="balanced")
    ),
    "softmax top-4": _gate(_SWITCH, gate=SoftmaxTopKGate()),
    "softmax top-4, z-loss 0.001": _gate(_losses_of(switch=0.01, z=0.001), gate=SoftmaxTopKGate()),
    "Switch: top-1 of 8 experts of 1024": _gate(
        _SWITCH, gate=SoftmaxTopKGate(renormalize=False, jitter=0.01), num_experts=8, k=1, hidden=1024
    ),
    "sigmoid top-4 with bias": _gate(_NONE, gate=SigmoidTopKGate()),
    "expert choice (sees the future)": _gate(_NONE, gate=ExpertChoiceGate()),
    "softmax over all, experts of 32": _gate(_NONE, gate=SoftmaxGate(), k=32, hidden=32),
}


def _optim(*, expert_dtype: str = "float32", **optim: Any) -> Vary:
    return lambda config: replace(
        config,
        optim=replace(config.optim, **optim),
        model=replace(config.model, expert_dtype=expert_dtype),
    )


# Of the experts; everything else has Adam in all rows.
OPTIMIZERS: Mapping[str, Vary] = {
    "Adam": _optim(),
    "factored": _optim(experts="factored"),
    "factored, bfloat16, rounded at random": _optim(
        experts="factored", expert_dtype="bfloat16", rounding="stochastic"
    ),
    "factored, bfloat16, rounded to the nearest": _optim(experts="factored", expert_dtype="bfloat16"),
}


def _softmax(samples: int, tables: str = "adam") -> Vary:
    return lambda config: replace(
        config,
        model=replace(config.model, softmax_samples=samples),
        optim=replace(config.optim, tables=tables),
    )


IN_EQUAL_TIME = ", in equal time"
SOFTMAX: Mapping[str, Vary] = {
    "all words": _softmax(0),
    "8,192 words": _softmax(8192),
    f"8,192 words{IN_EQUAL_TIME}": _softmax(8192),
    "8,192 words, tables by rows": _softmax(8192, "rows"),
}

TABLES: Mapping[str, Mapping[str, Vary]] = {
    "losses": LOSSES,
    "gates": GATES,
    "optimizers": OPTIMIZERS,
    "softmax": SOFTMAX,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="small-moe-32")
    parser.add_argument("--only", nargs="+", help="names of rows; all where it is absent")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--search-steps", type=int, default=500)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument(
        "--expert-rates", type=float, nargs="+", help="over the learning rate (default: the recipe's)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--timed-steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
