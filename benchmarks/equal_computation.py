"""Sparse against dense at equal multiply-adds per word: the experiment of section 5.1 on any dataset.

    python -m benchmarks.equal_computation --data DIR --out RUNS --steps 2000 --search-steps 500

For each model: a search over learning rates, and over those of a mixture's experts, without dropout, then
over dropouts at the best rates, each trial judged on the validation split; then one run for each seed with
what was best, reported on the test split.
All models see the same batches. Everything is a run folder and is resumed when the command is given again;
`RUNS/results.json` and the printed table hold what is finished so far.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsegate.data import Dataset
from sparsegate.evaluation.perplexity import evaluate
from sparsegate.inspection.balance import balance_metrics
from sparsegate.models import MixtureLM
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import recipe
from sparsegate.recipes.search import Trial, search
from sparsegate.training.config import RunConfig, SentencesConfig
from sparsegate.training.loop import train
from sparsegate.training.storage import write_json_atomically

MODELS = (
    "small-moe-32",
    "small-moe-1-wide",
    "small-4xlstm",
    "small-moe-1-deep",
    "small-lstm",
    "small-moe-256",
)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    results = []
    for name in args.models:
        results.append(measure(name, args))
        write_json_atomically(args.out / "results.json", results)
        print(table(results), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Search, then the runs with every seed; one row of the table."""
    config = recipe(name)
    config = replace(config, data=str(args.data), seed=0)
    if args.sentences:
        config = replace(config, batches=SentencesConfig(batch_words=1024, max_length=64))
    best, tried = tune(shortened(config, args.search_steps), args)
    config = replace(
        shortened(config, args.steps),
        optim=replace(config.optim, learning_rate=best.learning_rate, expert_rate=best.expert_rate),
        model=replace(config.model, dropout=best.dropout),
    )
    runs = [
        final_run(replace(config, seed=seed), folder=args.out / name / f"seed-{seed}") for seed in args.seeds
    ]
    costs = plan(replace(config.model, vocab_size=Dataset.open(args.data).vocabulary.size))
    return {
        "name": name,
        "parameters_without_embedding_and_softmax": costs.parameters_without_embedding_and_softmax,
        "ops_per_timestep": costs.ops_per_timestep,
        "learning_rate": best.learning_rate,
        "expert_rate": best.expert_rate,
        "dropout": best.dropout,
        "trials": tried,
        "runs": runs,
    }


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """A run of so many steps that is evaluated at its end alone: no model is stopped at its best moment."""
    training = replace(config.training, steps=steps, evaluate_every=steps, checkpoint_every=min(steps, 500))
    return replace(config, training=training)


def tune(config: RunConfig, args: argparse.Namespace) -> tuple[Trial, list[dict[str, float]]]:
    """The best of all rates without dropout, and of that choice with each dropout."""
    folder = args.out / config.name / "search"
    expert_rates = [config.optim.expert_rate]
    if args.expert_rates and isinstance(config.model, MixtureLM):
        expert_rates = args.expert_rates

    def tried(learning_rates: list[float], expert_rates: list[float], dropouts: list[float]) -> list[Trial]:
        return search(
            config,
            folder=folder,
            learning_rates=learning_rates,
            expert_rates=expert_rates,
            dropouts=dropouts,
            console=None,
            on_trial=lambda trial: print(config.name, trial, flush=True),
        )

    first = tried(args.learning_rates, expert_rates, [0.0])
    second = tried([first[0].learning_rate], [first[0].expert_rate], args.dropouts)
    trials = sorted([*first, *second], key=lambda trial: trial.valid_nll)
    return trials[0], [
        {
            "learning_rate": t.learning_rate,
            "expert_rate": t.expert_rate,
            "dropout": t.dropout,
            "valid_perplexity": math.exp(t.valid_nll),
        }
        for t in trials
    ]


def final_run(config: RunConfig, *, folder: Path) -> dict[str, Any]:
    """Train with one seed, and measure on the test split what is left at the last step."""
    result_file = folder / "result.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    started = time.monotonic()
    ended = train(config, folder=folder, resume=True)
    if ended.stopped_by:
        raise SystemExit(f"{folder}: saved on {ended.stopped_by}; the same command goes on")
    state = ended.state
    hours = (time.monotonic() - started) / 3600
    dataset = Dataset.open(Path(config.data))
    train_split = dataset.split("train")
    words_per_token = (train_split.num_words + train_split.num_sentences) / train_split.num_tokens
    test = evaluate(
        state.model, dataset.split("test"), batch_size=16, num_steps=64, context=config.batches.context
    )
    result = {
        "seed": config.seed,
        "tokens": state.progress.tokens,
        "words": round(state.progress.tokens * words_per_token),
        "hours": hours,
        "valid_perplexity": math.exp(state.progress.best_nll),
        **{f"test_{key}": value for key, value in test.metrics().items()},
        "balance": {layer: balance_metrics(sums) for layer, sums in test.sums.items()},
    }
    write_json_atomically(result_file, result)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The rows so far, in Markdown."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda row: row["name"],
        "multiply-adds per token (k)": lambda row: f"{row['ops_per_timestep'] / 1e3:.0f}",
        "parameters (M)": lambda row: f"{row['parameters_without_embedding_and_softmax'] / 1e6:.2f}",
        "learning rate": lambda row: f"{row['learning_rate']:g}",
        "of experts": lambda row: f"{row['expert_rate']:g}",
        "dropout": lambda row: f"{row['dropout']:g}",
        "test perplexity by seed": lambda row: ", ".join(
            f"{run['test_perplexity']:.2f}" for run in row["runs"]
        ),
        "per word": lambda row: f"{_mean(row, 'test_word_perplexity'):.1f}",
        "bits per byte": lambda row: f"{_mean(row, 'test_bits_per_byte'):.3f}",
        "words seen (M)": lambda row: f"{_mean(row, 'words') / 1e6:.2f}",
        "hours a run": lambda row: f"{_mean(row, 'hours'):.2f}",
    }
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[show(row) for show in columns.values()] for row in results]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mean(row: dict[str, Any], key: str) -> float:
    return statistics.mean(run[key] for run in row["runs"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument(
        "--sentences",
        action="store_true",
        help="shuffled sentences of at most 64 tokens, each from a fresh state as in the paper, in place of "
        "continuous text",
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--search-steps", type=int, default=500)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument(
        "--expert-rates", type=float, nargs="+", help="over the learning rate (default: the recipe's)"
    )
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
