"""What a study has found so far: a row for each model and budget, as JSON and as a table."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...benchmarking.measuring import markdown
from ...models import LanguageModelConfig, MixtureLM
from ...models.gates import HierarchicalGate
from ...models.translation import Translation
from ...training.overrides import to_json
from ...training.run_folder import read_run_config
from ...training.strict_json import Json
from ..cluster import arithmetic_flops
from ..planner import Plan, plan
from .config import Study
from .intervals import Interval, over_pieces, over_seeds
from .ladder import LEAST, MOST_ON_TOP
from .measuring import Measured, read_measured

Kind = Literal["dense", "flat mixture", "hierarchical mixture"]
_BySeed = Mapping[int, Mapping[int, Measured]]  # then by budget


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model after one budget of words.

    equal_cost: whether it has the multiply-adds of the comparison. perplexity: on the test split, per word
    with one end for each sentence, the geometric mean over the seeds; low, high: its 95% interval, over
    `interval_over`. against_dense: its perplexity over that of the best dense model of the comparison, run
    by run of the same seed, which had the same batches, on the same test text; None for that model itself.
    passes: over the training text. tflops: trained, by the paper's metric: backward counts twice the forward
    pass, a multiply-add is two operations, and the softmax is counted, the gate too. balance: on the test
    split, the first seed.
    """

    model: str
    kind: Kind
    equal_cost: bool
    parameters: int
    parameters_without_embedding_and_softmax: int
    ops_per_timestep: int
    budget: int
    words: int
    passes: float
    steps: int
    learning_rate: float
    expert_rate: float
    seeds: list[int]
    perplexities: list[float]
    perplexity: float
    low: float
    high: float
    interval_over: str
    against_dense: Interval | None
    tokens_per_second: float
    tflops: float
    balance: dict[str, dict[str, float]]


def collect(folder: Path, study: Study) -> list[Row]:
    """Everything that has been measured in a study's folder, whichever command asked for it."""
    runs: dict[str, dict[int, dict[int, Measured]]] = {}  # by model, seed and budget
    models: dict[str, LanguageModelConfig] = {}
    for run in sorted((folder / "runs").glob("*/seed-*")):
        measured = read_measured(run)
        if measured:
            config = read_run_config(run)
            assert not isinstance(config.model, Translation)
            models[config.name] = config.model
            runs.setdefault(config.name, {})[config.seed] = measured
    rows = [row for name in runs for row in _rows(name, models[name], runs[name], study)]
    best = _best_dense(rows)
    rows = [
        replace(row, against_dense=_against(runs[row.model], runs[best[row.budget]], row.budget))
        if best.get(row.budget, row.model) != row.model
        else row
        for row in rows
    ]
    return sorted(rows, key=lambda row: (row.budget, row.parameters_without_embedding_and_softmax, row.model))


def _rows(name: str, model: LanguageModelConfig, by_seed: _BySeed, study: Study) -> Iterator[Row]:
    costs = plan(model)
    for budget in sorted({words for measured in by_seed.values() for words in measured}):
        runs = {seed: measured[budget] for seed, measured in sorted(by_seed.items()) if budget in measured}
        yield _row(name, model, costs, budget, runs, study)


def _row(
    name: str,
    model: LanguageModelConfig,
    costs: Plan,
    budget: int,
    runs: Mapping[int, Measured],
    study: Study,
) -> Row:
    first = next(iter(runs.values()))
    interval = _interval([run.log_perplexity for run in runs.values()], first.nll_nats, first)
    speed = statistics.median(run.tokens_per_second for run in runs.values())
    most = MOST_ON_TOP if study.gates == "on-top" else 1.0
    return Row(
        model=name,
        kind=kind_of(model),
        equal_cost=LEAST * study.ops_per_timestep <= costs.ops_per_timestep <= most * study.ops_per_timestep,
        parameters=costs.parameters,
        parameters_without_embedding_and_softmax=costs.parameters_without_embedding_and_softmax,
        ops_per_timestep=costs.ops_per_timestep,
        budget=budget,
        words=first.words,
        passes=first.passes,
        steps=first.step,
        learning_rate=first.learning_rate,
        expert_rate=first.expert_rate,
        seeds=list(runs),
        perplexities=[run.perplexity for run in runs.values()],
        perplexity=interval.mean,
        low=interval.low,
        high=interval.high,
        interval_over=interval.over,
        against_dense=None,
        tokens_per_second=speed,
        tflops=arithmetic_flops(model) * speed / 1e12,
        balance=first.balance,
    )


def _best_dense(rows: Sequence[Row]) -> dict[int, str]:
    """By budget, the name of the dense model of the comparison whose perplexity is the lowest."""
    dense = [row for row in rows if row.kind == "dense" and row.equal_cost]
    return {row.budget: row.model for row in sorted(dense, key=lambda row: -row.perplexity)}


def _against(runs: _BySeed, others: _BySeed, budget: int) -> Interval | None:
    """Perplexity over that of others, each run beside that of the same seed."""
    pairs = [
        (measured[budget], others[seed][budget])
        for seed, measured in sorted(runs.items())
        if budget in measured and budget in others.get(seed, {})
    ]
    if not pairs:
        return None
    one, other = pairs[0]
    nll_P = [a - b for a, b in zip(one.nll_nats, other.nll_nats, strict=True)]
    return _interval([a.log_perplexity - b.log_perplexity for a, b in pairs], nll_P, one)


def _interval(logs: Sequence[float], nll_P: Sequence[float], first: Measured) -> Interval:
    """Of e to the power of logs, one for each seed, or of the first seed's, over pieces of the test text."""
    if len(logs) > 1:
        return over_seeds(logs).exp()
    return over_pieces(nll_P, first.tokens).times(first.tokens_per_word).exp()


def kind_of(model: LanguageModelConfig) -> Kind:
    """What the figures tell apart."""
    if not isinstance(model, MixtureLM):
        return "dense"
    return "hierarchical mixture" if isinstance(model.gate, HierarchicalGate) else "flat mixture"


def to_rows(rows: list[Row]) -> list[Json]:
    """As JSON takes them."""
    return [to_json(row) for row in rows]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, a table for each budget, the smallest first."""
    parts = []
    for budget in sorted({row.budget for row in rows}):
        some = [row for row in rows if row.budget == budget]
        words, passes = some[0].words, some[0].passes
        head = f"## After {words / 1e6:,.3g} million words ({passes:.2f} passes over the training text)"
        parts.append(f"{head}\n\n{markdown([_cells(row) for row in some])}\n")
    return "\n".join(parts)


def _cells(row: Row) -> dict[str, str]:
    return {
        "model": row.model,
        "parameters without embedding and softmax (M)": _millions(
            row.parameters_without_embedding_and_softmax
        ),
        "multiply-adds (k)": f"{row.ops_per_timestep / 1e3:,.1f}",
        "learning rate": f"{row.learning_rate:g}",
        "of experts": "" if row.kind == "dense" else f"{row.expert_rate:g} of it",
        "test perplexity": f"{row.perplexity:.2f}",
        "95% interval": f"{row.low:.2f} to {row.high:.2f}",
        "over": f"{len(row.seeds)} seeds" if len(row.seeds) > 1 else row.interval_over,
        "against the best dense": _relative(row.against_dense),
        "tokens/s": f"{row.tokens_per_second:,.0f}",
        "TFLOPS": f"{row.tflops:.3g}",
        "experts without a token": " ".join(
            f"{metrics['dead_experts']:.0f}" for metrics in row.balance.values()
        ),
    }


def _relative(ratio: Interval | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.mean - 1:+.1%} ({ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}" if number < 1e8 else f"{number / 1e6:,.1f}"
