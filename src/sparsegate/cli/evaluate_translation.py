"""`sparsegate evaluate` for a translation model: perplexity, and the scores of its translations."""

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.files import write_atomically
from ..evaluation.translating import PairEvaluation, TranslationEvaluation
from ..evaluation.translation import Comparison, compare, require_scores, write_lines, write_references
from ..inspection.balance import balance_metrics
from ..recipes.load import load, require_translation
from ..recipes.translation_run import TranslationRun
from ..training.run_folder import holds_run
from .decoding_options import OF_DRAWS, OF_SEARCH, decoding_of
from .progress import counted
from .verb import Parser

_OF_DECODING = {**OF_SEARCH, "--temperature": "temperature", **OF_DRAWS}
# What is of no use with a language model, and where the arguments have it.
_ALONE = {
    "--pair": "pair",
    "--sentences": "sentences",
    "--resamples": "resamples",
    "--against": "against",
    "--out": "out",
    "--greedy": "greedy",
    **_OF_DECODING,
}


def add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("for translation models")
    group.add_argument("--pair", action="append", metavar="EN-FR", help="pairs of languages (default: all)")
    group.add_argument(
        "--sentences", type=int, metavar="N", help="translate the first N of each pair (default: all)"
    )
    group.add_argument(
        "--resamples", type=int, metavar="N", help="of the test set, for intervals; 1000 is usual"
    )
    group.add_argument(
        "--against",
        type=Path,
        metavar="RUN|FILE",
        help="compare with another run, or with the hypotheses in a file, by paired bootstrap",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for translations, references and scores (default: in RUN/translations, under the name of the "
        "split, the step and what else was asked for)",
    )


def refuse_options(args: Namespace) -> None:
    """ValueError for what a language model has no use for."""
    for flag, name in _ALONE.items():
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise ValueError(f"{flag}: is for translation models; leave it out")


def run(args: Namespace, trained: TranslationRun) -> None:
    if args.part != "all":
        raise ValueError("--part: is for language models; leave it out, or give --sentences")
    if args.sentences is not None and args.sentences < 1:
        raise ValueError(f"--sentences ({args.sentences}) must be at least 1")
    require_scores()
    baseline = _baseline(args, trained)
    folder = args.out or args.run / "translations" / _name(args, trained.step)
    with _folder(folder):  # where nothing can be written, it shows before the work
        result = _evaluate(args, trained)
        if not math.isfinite(result.likelihood.nll_nats):
            raise ValueError(f"{args.run}: its likelihood is not finite; use an earlier checkpoint")
        _write_lines(folder, result)  # whatever becomes of the comparison
    compared = {} if baseline is None else _compare(args, baseline, result)
    report = _as_json(args, trained, result, compared)
    write_atomically(folder / "scores.json", json.dumps(report, indent=1).encode() + b"\n")
    if args.json:
        print(json.dumps(report))
    else:
        _print(args, trained, result, compared, folder)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Makes the folder, and those above it; what is empty in the end is not left behind."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _name(args: Namespace, step: int) -> str:
    """Another one for other translations, so that none are mixed with those of an earlier command."""
    asked = {
        "of": None if args.data is None else args.data.name,
        "first": args.sentences,
        **{flag.removeprefix("--"): getattr(args, name) for flag, name in _OF_DECODING.items()},
    }
    words = [args.split, "step", step, *sorted(args.pair or [])]
    words += [word for name, value in asked.items() if value is not None for word in (name, value)]
    return "-".join(map(str, [*words, *["greedy"] * args.greedy]))


def _evaluate(args: Namespace, trained: TranslationRun) -> TranslationEvaluation:
    with counted("evaluating") as progress:
        return trained.evaluate(
            args.split,
            data=args.data,
            pairs=args.pair,
            num_translated=args.sentences,
            decoding=decoding_of(args),
            resamples=args.resamples or 0,
            progress=progress,
        )


Baseline = TranslationRun | list[str]


def _baseline(args: Namespace, trained: TranslationRun) -> Baseline | None:
    """What `--against` names: a run, or one pair's hypotheses. What is wrong with it shows before anything is
    translated."""
    if args.against is None:
        return None
    if holds_run(args.against):
        return require_translation(load(args.against, device=args.device))
    part = trained.dataset(args.data).part(args.split)
    names = args.pair or list(part)
    if len(names) > 1:
        raise ValueError(f"{args.against}: is one file for {len(names)} pairs; choose one by --pair")
    lines = _lines(args.against)
    if names[0] in part:  # evaluation refuses another
        number = part[names[0]].num_examples
        number = number if args.sentences is None else min(number, args.sentences)
        if len(lines) != number:
            raise ValueError(
                f"{args.against}: has {len(lines):,} lines, but {number:,} sentences are translated; "
                "give the hypotheses of the same ones"
            )
    return lines


def _compare(
    args: Namespace, baseline: Baseline, result: TranslationEvaluation
) -> dict[str, list[Comparison]]:
    """Each pair's comparison with the baseline."""
    hypotheses = _hypotheses(args, baseline, result)
    return {
        name: compare(
            hypotheses[name],
            pair.hypotheses,
            pair.references,
            target_language=name.partition("-")[2],
            resamples=args.resamples or 1000,
        )
        for name, pair in result.pairs.items()
    }


def _hypotheses(args: Namespace, baseline: Baseline, result: TranslationEvaluation) -> dict[str, list[str]]:
    """The baseline's, by pair; they are of the same sentences."""
    if not isinstance(baseline, TranslationRun):
        return dict.fromkeys(result.pairs, baseline)
    other = _evaluate(args, baseline)
    for name, pair in result.pairs.items():
        if name not in other.pairs or other.pairs[name].references != pair.references:
            raise ValueError(
                f"{args.against}: its {args.split} text of {name} is not that of {args.run}; give --data"
            )
    return {name: pair.hypotheses for name, pair in other.pairs.items()}


def _lines(path: Path) -> list[str]:
    """As sacrebleu reads them: a carriage return within a line does not end it."""
    try:
        return path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8; convert it with iconv") from None


def _as_json(
    args: Namespace,
    trained: TranslationRun,
    result: TranslationEvaluation,
    compared: Mapping[str, list[Comparison]],
) -> dict[str, Any]:
    return {
        "run": str(args.run),
        "step": trained.step,
        "data": str(args.data or trained.config.data),
        "split": args.split,
        "decoding": {"kind": type(decoding_of(args)).__name__, **asdict(decoding_of(args))},
        **result.metrics(),
        "pairs": {name: _pair_as_json(pair, compared.get(name, [])) for name, pair in result.pairs.items()},
    }


def _pair_as_json(pair: PairEvaluation, compared: list[Comparison]) -> dict[str, Any]:
    likelihood = pair.likelihood
    return {
        **{name: pair.metrics()[name] for name in ("loss", "perplexity", "word_perplexity")},
        "subwords": likelihood.num_subwords,
        "words": likelihood.num_words,
        "sentences": likelihood.num_sentences,
        "translated": len(pair.hypotheses),
        "scores": [asdict(score) for score in pair.scores],
        "compared": [asdict(each) | {"difference": each.difference} for each in compared],
        "balance": {layer: balance_metrics(sums) for layer, sums in pair.sums.items()},
    }


def _write_lines(folder: Path, result: TranslationEvaluation) -> None:
    """Files that sacrebleu's own command reads."""
    for name, pair in result.pairs.items():
        write_lines(folder / f"{name}.hypotheses.txt", pair.hypotheses)
        write_references(folder / f"{name}.references.txt", pair.references)


def _print(
    args: Namespace,
    trained: TranslationRun,
    result: TranslationEvaluation,
    compared: Mapping[str, list[Comparison]],
    folder: Path,
) -> None:
    title = f"{args.run}, step {trained.step:,}: {args.split}"
    table = Table(title=title, title_justify="left", caption=str(folder), caption_justify="left")
    table.add_column("pair")
    for heading in ("sentences", "perplexity", "per word", "BLEU", "chrF"):
        table.add_column(heading, justify="right")
    for name, pair in result.pairs.items():
        perplexities = (pair.likelihood.perplexity, pair.likelihood.word_perplexity)
        table.add_row(
            name,
            f"{len(pair.hypotheses):,}",
            *(f"{value:.3f}" for value in perplexities),
            *(_score(score.value, score.interval) for score in pair.scores),
        )
    console = Console()
    console.print(table)
    for name, pair in result.pairs.items():
        for line in [*compared.get(name, []), *(score.signature for score in pair.scores)]:
            console.print(f"{name}: {line}", highlight=False, soft_wrap=True)


def _score(value: float, interval: float | None) -> str:
    return f"{value:.2f}" if interval is None else f"{value:.2f} ± {interval:.2f}"
