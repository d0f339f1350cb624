"""One model for many pairs of languages beside one for each pair: the comparison of the paper's table 5.

    python -m benchmarks.multilingual_models --data DIR --out RUNS --steps 3600 --single-steps 1200

A mixture and a dense model of equal cost learn all pairs of the dataset, from the same batches. The models of
a single pair are as large as the dense one and have the same subwords. Each model is measured on the test
text of its pairs, and the mixture's translations are compared with those of all others. Learning rates,
intervals, run folders and going on are as in `benchmarks.translation_models`.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.equal_computation import shortened
from benchmarks.translation_models import add_arguments, at_width, compared, measured, searched
from sparsegate.benchmarking.measuring import circumstances
from sparsegate.data.parallel import TranslationDataset
from sparsegate.recipes.registry import recipe
from sparsegate.training.config import ParallelConfig, RunConfig
from sparsegate.training.storage import write_json_atomically

MIXTURE, DENSE, SINGLE = "small-multilingual-moe-64", "small-multilingual-dense", "small-translation-dense"
SCORES = ("BLEU", "chrF")
Rows = Mapping[str, dict[str, Any]]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    pairs = tuple(TranslationDataset.open(args.data).part("train"))
    by_seed: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in args.seeds:
        rows = by_seed[str(seed)] = {}
        for config in configurations(pairs, args):
            config = replace(searched(replace(config, seed=0), args), seed=seed)
            row = measured(config, args)
            rows[config.name] = {"steps": config.training.steps, **row}
            if config.name != MIXTURE:
                own, mixture = (args.out / name / f"seed-{seed}" for name in (config.name, MIXTURE))
                rows[config.name]["mixture_against_it"] = compared(own, mixture, row["pairs"])
            write_json_atomically(args.out / "results.json", {**circumstances(), "seeds": by_seed})
            print(f"seed {seed}\n\n{table(rows, pairs)}\n", flush=True)


def configurations(pairs: Sequence[str], args: argparse.Namespace) -> list[RunConfig]:
    """The models, the mixture first, as the others are compared with it."""
    single = recipe(SINGLE)
    assert isinstance(single.batches, ParallelConfig)
    singles = [
        replace(single, name=name_of_single(pair), batches=replace(single.batches, pairs=(pair,)))
        for pair in pairs
    ]
    steps = [args.steps] * 2 + [args.single_steps or args.steps] * len(pairs)
    return [
        shortened(replace(at_width(config, args.width), data=str(args.data)), num_steps)
        for config, num_steps in zip([recipe(MIXTURE), recipe(DENSE), *singles], steps, strict=True)
    ]


def name_of_single(pair: str) -> str:
    return f"{SINGLE}-{pair}"


def table(rows: Rows, pairs: Sequence[str]) -> str:
    """What has been measured, laid out as table 5, in Markdown."""
    lines = [["", "a model for each pair", "one, dense", "one, mixture", "against dense", "against single"]]
    lines.append(["---"] * len(lines[0]))
    of_models = [rows.get(name) for name in (name_of_single(pairs[0]), DENSE, MIXTURE)]
    for title, name, unit in (
        ("parameters (M)", "parameters", 1e6),
        ("multiply-adds (M)", "ops_per_timestep", 1e6),
        ("steps", "steps", 1),
        ("target subwords read (M)", "tokens", 1e6),
    ):
        lines.append(
            [title, *("" if row is None else f"{row[name] / unit:.4g}" for row in of_models), "", ""]
        )
    lines.append(["perplexity, all", *_perplexities(rows, pairs)])
    lines += [[f"perplexity, {pair}", *_perplexities(rows, [pair])] for pair in pairs]
    for place, name in enumerate(SCORES):
        lines += [[f"{name}, {pair}", *_scores(rows, pair, place)] for pair in pairs]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_pair(rows: Rows, pair: str, key: str) -> list[Any]:
    """What the single, the dense and the mixture have under a key for a pair; None where there is nothing."""
    return [rows.get(name, {}).get(key, {}).get(pair) for name in (name_of_single(pair), DENSE, MIXTURE)]


def _perplexities(rows: Rows, pairs: Sequence[str]) -> list[str]:
    """Of some pairs' text together, and how much lower or higher the mixture's are."""
    by_model = zip(*(_of_pair(rows, pair, "pairs") for pair in pairs), strict=True)
    single, dense, mixture = (None if None in found else _perplexity(found) for found in by_model)
    cells = ["" if value is None else f"{value:.2f}" for value in (single, dense, mixture)]
    for value in (dense, single):
        cells.append("" if value is None or mixture is None else f"{mixture / value - 1:+.1%}")
    return cells


def _perplexity(pairs: Sequence[Mapping[str, Any]]) -> float:
    """Per subword of all pairs' text."""
    nats = sum(pair["loss"] * pair["subwords"] for pair in pairs)
    return math.exp(nats / sum(pair["subwords"] for pair in pairs))


def _scores(rows: Rows, pair: str, place: int) -> list[str]:
    """Of one pair, with intervals, and by how much the mixture's differ."""
    cells = []
    for found in _of_pair(rows, pair, "pairs"):
        score = found and found["scores"][place]
        cells.append(f"{score['value']:.1f} ± {score['interval']:.1f}" if score else "")
    single, dense, _ = _of_pair(rows, pair, "mixture_against_it")
    for found in (dense, single):
        cells.append(
            f"{found[place]['difference']:+.1f} (p = {found[place]['p_value']:.3f})" if found else ""
        )
    return cells


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--single-steps", type=int, metavar="N", help="of the models of a single pair (default: --steps)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
