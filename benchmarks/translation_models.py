"""Translation models of equal cost on one dataset: perplexity and BLEU, with intervals, beside a baseline.

    python -m benchmarks.translation_models --data DIR --out RUNS --steps 2000

All models see the same batches. A learning rate, one for its experts and a dropout are chosen for each on the
validation split after `--search-steps`, where several are given; then there is one run for each seed. Of its
best checkpoint the test split's perplexity is measured and its translations by beam search, with bootstrap
intervals, and paired with those of the first model and the same seed. Everything is a run folder and is
resumed when the command is given again; what was measured is kept beside it.
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.equal_computation import shortened
from sparsegate.benchmarking.measuring import circumstances
from sparsegate.data.languages import languages_of
from sparsegate.data.parallel import TranslationDataset
from sparsegate.evaluation.translation import compare, write_lines
from sparsegate.inspection.balance import balance_metrics
from sparsegate.models.translation import BlockConfig, MixtureBlock, NoBlock, Translation
from sparsegate.recipes.load import load, require_translation
from sparsegate.recipes.planner import plan
from sparsegate.recipes.registry import recipe
from sparsegate.recipes.search import search
from sparsegate.training.config import RunConfig
from sparsegate.training.log import read_log
from sparsegate.training.loop import train
from sparsegate.training.storage import read_json, write_json_atomically

MODELS = (
    "small-translation-dense",
    "small-translation-moe-32",
    "small-translation-lstm",
    "small-translation-moe-32-noisy",
    "small-translation-moe-256-h",
)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.models:
            config = replace(at_width(recipe(name), args.width), data=str(args.data), seed=0)
            config = replace(searched(config, args), seed=seed)
            row = measured(shortened(config, args.steps), args)
            rows.append({"name": name, "seed": seed, **row, "words": words_read(row["tokens"], args.data)})
            first, own = (args.out / each / f"seed-{seed}" for each in (args.models[0], name))
            rows[-1]["compared"] = {} if own == first else compared(first, own, row["pairs"])
            write_json_atomically(
                args.out / "results.json", {**circumstances(), "steps": args.steps, "rows": rows}
            )
            print(table(rows), flush=True)


def at_width(config: RunConfig, width: int | None) -> RunConfig:
    """The recipe with all its sizes in proportion to another width; None leaves it as it is."""
    if width is None:
        return config
    model = config.model
    assert isinstance(model, Translation), config.name
    assert model.lstm_projection is not None, config.name

    def scaled(size: int) -> int:
        return size * width // model.width

    def scaled_block(block: BlockConfig) -> BlockConfig:
        return block if isinstance(block, NoBlock) else replace(block, hidden=scaled(block.hidden))

    return replace(
        config,
        model=replace(
            model,
            width=width,
            lstm_units=scaled(model.lstm_units),
            lstm_projection=scaled(model.lstm_projection),
            attention_width=scaled(model.attention_width),
            encoder_block=scaled_block(model.encoder_block),
            decoder_block=scaled_block(model.decoder_block),
        ),
    )


def searched(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """With the rates and the dropout, of those that are given, of lowest validation perplexity after the
    search steps; the only ones are taken without a search."""
    rates, dropouts = args.learning_rates, args.dropouts or [config.model.dropout]
    expert_rates = [config.optim.expert_rate]
    if args.expert_rates and has_experts(config):
        expert_rates = args.expert_rates
    if len(rates) == len(expert_rates) == len(dropouts) == 1:
        rate, expert_rate, dropout = rates[0], expert_rates[0], dropouts[0]
    else:
        best, *_ = search(
            shortened(config, args.search_steps),
            folder=args.out / config.name / "search",
            learning_rates=rates,
            expert_rates=expert_rates,
            dropouts=dropouts,
            console=None,
            on_trial=lambda trial: print(config.name, trial, flush=True),
        )
        rate, expert_rate, dropout = best.learning_rate, best.expert_rate, best.dropout
    return replace(
        config,
        optim=replace(config.optim, learning_rate=rate, expert_rate=expert_rate),
        model=replace(config.model, dropout=dropout),
    )


def has_experts(config: RunConfig) -> bool:
    model = config.model
    assert isinstance(model, Translation), config.name
    return any(isinstance(block, MixtureBlock) for block in (model.encoder_block, model.decoder_block))


def measured(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Train a model, or go on with it, and measure it, unless that has been done."""
    folder = args.out / config.name / f"seed-{config.seed}"
    path = folder / "measured.json"
    if path.exists():
        return read_json(path)  # pyrefly: ignore[bad-return]
    ended = train(config, folder=folder, resume=True)
    if ended.stopped_by:
        raise SystemExit(f"stopped by {ended.stopped_by}; the same command goes on")
    run = require_translation(load(folder))
    found = run.evaluate("test", pairs=run.pairs, num_translated=args.sentences, resamples=1000)
    speeds = [
        line["train/tokens_per_second"] for line in read_log(folder / "log.jsonl") if line["kind"] == "step"
    ]
    costs = plan(run.config.model)
    pairs = {}
    for name, pair in found.pairs.items():
        write_lines(folder / f"{name}.hypotheses.txt", pair.hypotheses)
        write_lines(folder / f"{name}.references.txt", pair.references)
        pairs[name] = {
            **pair.metrics(),
            "subwords": pair.likelihood.num_subwords,
            "scores": [asdict(score) for score in pair.scores],
            "balance": {layer: balance_metrics(sums) for layer, sums in pair.sums.items()},
        }
    row = {
        "learning_rate": config.optim.learning_rate,
        "expert_rate": config.optim.expert_rate,
        "dropout": config.model.dropout,
        "parameters": costs.parameters,
        "ops_per_timestep": costs.ops_per_timestep,
        "best_step": run.step,
        "tokens": ended.state.progress.tokens,
        "tokens_per_second": sorted(speeds)[len(speeds) // 2],
        "pairs": pairs,
    }
    write_json_atomically(path, row)
    return row


def words_read(num_tokens: int, data: Path) -> int:
    """How many target words so many target subwords are, the ends of sentences among these."""
    texts = [pair.target for pair in TranslationDataset.open(data).parts["train"].values()]
    each = sum(text.num_words for text in texts) / sum(text.num_tokens for text in texts)
    return round(num_tokens * each)


def compared(baseline: Path, system: Path, pairs: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Paired bootstrap of the translations in two run folders, by pair of languages."""
    found = {}
    for pair in pairs:
        hypotheses, references = f"{pair}.hypotheses.txt", f"{pair}.references.txt"
        comparisons = compare(
            *map(lines_of, (baseline / hypotheses, system / hypotheses, system / references)),
            target_language=languages_of(pair)[1],
            resamples=1000,
        )
        found[pair] = [asdict(each) | {"difference": each.difference} for each in comparisons]
    return found


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows so far, in Markdown."""
    lines = [
        [
            "model",
            "seed",
            "parameters (M)",
            "multiply-adds (M)",
            "words read (M)",
            "hours",
            "pair",
            "perplexity",
            "BLEU",
            "chrF",
            "p (BLEU)",
        ],
    ]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        sizes = [
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['ops_per_timestep'] / 1e6:.2f}",
            f"{row['words'] / 1e6:.2f}",
            f"{row['tokens'] / row['tokens_per_second'] / 3600:.2f}",
        ]
        for name, pair in row["pairs"].items():
            scores = [f"{score['value']:.1f} ± {score['interval']:.1f}" for score in pair["scores"][:2]]
            compared = row["compared"].get(name)
            p = f"{compared[0]['p_value']:.3f}" if compared else ""
            lines.append(
                [row["name"], str(row["seed"]), *sizes, name, f"{pair['perplexity']:.2f}", *scores, p]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all comparisons of translation models may be told."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--width", type=int, help="of the models, all sizes in proportion (default: the recipe's)"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[4e-3])
    parser.add_argument(
        "--expert-rates", type=float, nargs="+", help="over the learning rate (default: the recipe's)"
    )
    parser.add_argument("--dropouts", type=float, nargs="+", help="(default: the recipe's)")
    parser.add_argument("--search-steps", type=int, default=300)
    parser.add_argument("--sentences", type=int, help="translate the first ones alone (default: all)")
    parser.add_argument("--threads", type=int, default=2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", default=MODELS, help="the first one is the baseline")
    return parser.parse_args()


if __name__ == "__main__":
    main()
